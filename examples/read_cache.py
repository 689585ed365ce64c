"""Reads a cache file of onnx_kivi with NumPy alone: `python read_cache.py FILE` lists what each slot and row holds.

The format is that of onnx_kivi/SPEC.md. Only honest files are understood; onnx_kivi itself checks every claim.
"""

import hashlib
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def read(path: str | Path) -> tuple[dict[str, Any], list[list[tuple[Array, Array]]]]:
    """The header, and per slot and row the keys and values, (heads, tokens, channels) f32."""
    data = Path(path).read_bytes()
    magic, version, size = struct.unpack_from("<6sHQ", data)
    assert (magic, version) in ((b"KIVIKV", 1), (b"KIVIKV", 2)), "another format, or another version of it"
    assert hashlib.sha256(data[:-32]).digest() == data[-32:], "damaged"
    header, position = json.loads(data[16 : 16 + size]), 16 + size

    def array(kind: str, *shape: int) -> Array:
        nonlocal position
        flat = np.frombuffer(data, kind, math.prod(shape), position)
        position += flat.nbytes
        return flat.reshape(shape)

    def codes(bits: int, heads: int, rows: int, count: int) -> Array:
        packed = array("u1", heads, rows, -(-count * bits // 8))
        each = packed[..., None] >> np.arange(0, 8, bits) & 2**bits - 1  # lowest bits first
        return np.asarray(each.reshape(heads, rows, -1)[..., :count], np.float32)

    def block(letter: str, bits: int, heads: int, tokens: int, channels: int, group: int | None = None) -> Array:
        if letter == "d":
            return array("<f4", heads, tokens, channels)
        if group is None:  # keys: a row of codes, a lo and a scale per channel
            c = codes(bits, heads, channels, tokens)
            lo, scale = (array("<f2", heads, channels).astype(np.float32)[..., None] for _ in range(2))
            return np.swapaxes(lo + scale * c, 1, 2)
        c, of = codes(bits, heads, tokens, channels), np.arange(channels) // (group or channels)
        lo, scale = (array("<f2", heads, tokens, of[-1] + 1).astype(np.float32)[..., of] for _ in range(2))
        return lo + scale * c

    def row(a: dict[str, Any], r: dict[str, Any]) -> tuple[Array, Array]:
        h, dk, dv, t = r["heads"], r["k_head_size"], r["v_head_size"], a["block_tokens"]
        assert {a.get("k_scheme", "affine"), a.get("v_scheme", "affine")} == {"affine"}, "another scheme"
        held = dict(r["segments"]) if version > 1 else {**r, "sealed": r["blocks"], "dense": r["residual"]}
        sinks, freed, sealed, rest = (held.get(tag, 0) for tag in ("sinks", "freed", "sealed", "dense"))
        parts = [(array("<f4", h, sinks, dk), array("<f4", h, sinks, dv))]
        parts.append((np.full((h, freed, dk), np.nan), np.full((h, freed, dv), np.nan)))  # what a window hides
        for k, v in zip((sealed or "")[::2], (sealed or "")[1::2], strict=True):
            parts.append((block(k, a["k_bits"], h, t, dk), block(v, a["v_bits"], h, t, dv, a["v_group_size"])))
        parts.append((array("<f4", h, rest, dk), array("<f4", h, rest, dv)))
        return np.concatenate([k for k, _ in parts], 1), np.concatenate([v for _, v in parts], 1)

    return header, [[row(slot["attributes"], r) for r in slot["rows"]] for slot in header["slots"]]


if __name__ == "__main__":
    header, slots = read(sys.argv[1])
    for slot, rows in zip(header["slots"], slots, strict=True):
        print(slot["attributes"]["slot"], slot["attributes"]["kind"], [(k.shape, v.shape) for k, v in rows])
