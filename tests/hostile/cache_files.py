"""Cache files with a right checksum that lie: every field of the header in turn has every wrong value."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .case import OURS, Case, Scene

PREFIX = struct.Struct("<6sHQ")
DIGEST_BYTES = 32
LIES: dict[str, Callable[[Any], Any]] = {
    "0": lambda _: 0,
    "-1": lambda _: -1,
    "one more": lambda old: old + 1 if isinstance(old, int) else old + "x",
    "2^31": lambda _: 2**31,
    "2^32": lambda _: 2**32,
    "2^63": lambda _: 2**63,
    "10^30": lambda _: 10**30,
    "a half": lambda _: 0.5,
    "true": lambda _: True,
    "null": lambda _: None,
    "text": lambda _: "x",
    "a list": lambda _: [],
    "an object": lambda _: {},
    "itself as text": lambda old: str(old) if isinstance(old, int) else [old],
}
FIELDS = {
    "": ("lengths", "slots", "step"),
    "lengths": ("0",),
    "step": ("model_id", "layers", "one_length", "spec_version"),
    "slots.0": ("attributes", "rows"),
    "slots.0.attributes": (
        *("slot", "kind", "k_bits", "v_bits", "block_tokens", "v_group_size", "residual_length", "sink_length"),
        *("scale", "softcap", "is_causal", "window", "nan_to_zero", "spec_version"),
    ),
    "slots.0.rows": ("0",),
    "slots.0.rows.0": ("heads", "k_head_size", "v_head_size", "segments"),
    "slots.0.rows.0.segments": ("0", "1", "2"),
    **{f"slots.0.rows.0.segments.{i}": ("0", "1") for i in range(3)},
}


def at(header: Any, path: str) -> Any:
    for key in filter(None, path.split(".")):
        header = header[int(key) if isinstance(header, list) else key]
    return header


def rewritten(path: Path, change: Callable[[Any], object]) -> None:
    """Change the header of a cache file, and give it the checksum that belongs to it."""
    data = path.read_bytes()
    magic, version, size = PREFIX.unpack_from(data)
    header = json.loads(data[PREFIX.size : PREFIX.size + size])
    change(header)
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    content = PREFIX.pack(magic, version, len(text)) + text + data[PREFIX.size + size : -DIGEST_BYTES]
    path.write_bytes(content + hashlib.sha256(content).digest())


def saved(scene: Scene) -> Path:
    """A file of the scene's cache: two slots, one row, codes in both."""
    path = scene.folder / "lie.kv"
    scene.cache.save(path)
    return path


def lying(where: str, key: str, lie: Callable[[Any], Any]) -> Callable[[Scene], object]:
    """Load the cache with one field changed; a value that the run doesn't depend on may be loaded, and must work."""

    def change(header: Any) -> None:
        holder = at(header, where)
        place = int(key) if isinstance(holder, list) else key
        old = holder[place]
        holder[place] = lie(old) if isinstance(old, int | str) or lie not in GROWING else [old]

    def act(scene: Scene) -> object:
        path = saved(scene)
        before = path.read_bytes()
        rewritten(path, change)
        if path.read_bytes() == before:
            return "the truth"
        with scene.session.load_cache(path) as cache:
            cache.save(path.with_name("again.kv"))
            assert path.with_name("again.kv").read_bytes() == path.read_bytes()
            scene.session.run(["logits"], scene.feeds(cache.length), cache=cache)
            return "a cache that works"

    return act


GROWING = (LIES["one more"], LIES["itself as text"])
# What a slot says of attention, not of what it holds: a node with other words reads the same cache.
NOT_HELD = ("scale", "softcap", "is_causal", "window", "nan_to_zero")


def _cases() -> Iterator[Case]:
    for where, keys in FIELDS.items():
        for key in keys:
            for name, lie in LIES.items():
                held = (*OURS, "silent") if key in (*NOT_HELD, "slot") else OURS
                yield Case(f"header: {where}.{key}: {name}", lying(where, key, lie), "expected|works|truth", held)


CASES = list(_cases())
