"""Cache files with a right checksum that lie: refused in a CacheError, or a cache that saves itself.

Both backends import what is read; each must export it again to the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import tempfile
from pathlib import Path
from typing import Any

from guided import Check, flipped
from guided import fuzz as guided

PREFIX = struct.Struct("<6sHQ")
DIGEST_BYTES = 32
NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    7,
    64,
    255,
    1 << 16,
    1 << 20,
    1 << 31,
    1 << 32,
    1 << 63,
    10**30,
    0.5,
    1e308,
    True,
    None,
    "8",
    "",
)


def fuzz(args: argparse.Namespace) -> None:
    """Run this fuzzer."""
    guided(args, Path(__file__).parent / "corpus" / "cache_file", check, mutate)


def check() -> Check:
    """What is run on each file."""
    from onnx_kivi.errors import CacheError
    from onnx_kivi.runtime.cache_file import load_state, save_state
    from onnx_kivi.runtime.select import get_backend

    backends = [get_backend(name) for name in ("numpy", "native")]
    folder = Path(tempfile.mkdtemp())

    def run(data: bytes) -> None:
        path = folder / "x.kv"
        path.write_bytes(data)
        try:
            state = load_state(path)
        except CacheError:
            return
        for backend in backends:
            handle = backend.import_state(state)
            backend.nbytes(handle), backend.dense_nbytes(handle), backend.sealed_tokens(handle)
            save_state(folder / "again.kv", backend.export_state(handle))
            assert (folder / "again.kv").read_bytes() == data, f"{backend.name} holds another cache than the file"
            if length := backend.length(handle):
                backend.reorder(handle, [0, 0])
                backend.crop(handle, length // 2)
            backend.close(handle)

    return run


def mutate(data: bytes, chance: random.Random) -> bytes:
    """A file with a lie in its header or arrays, and the checksum that belongs to it."""
    if len(data) < PREFIX.size + DIGEST_BYTES or chance.random() < 0.1:
        return flipped(data, chance)
    magic, version, size = PREFIX.unpack_from(data)
    body = data[PREFIX.size : -DIGEST_BYTES]
    try:
        header = json.loads(body[:size])
    except ValueError:
        return flipped(data, chance)
    arrays = body[size:]
    for _ in range(chance.randint(0, 2)):
        _lie(header, chance)
    if chance.random() < 0.3:
        arrays = flipped(arrays, chance)
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    content = PREFIX.pack(magic, version, len(text)) + text + arrays
    return content + hashlib.sha256(content).digest()


def _lie(header: Any, chance: random.Random) -> None:
    """Change something somewhere in the header: a number, a row or block more or less, a key."""
    at = header
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        if not keys:
            return
        key = chance.choice(keys)
        if not isinstance(at[key], dict | list) or chance.random() < 0.1:
            break
        at = at[key]
    old = at[key]
    match chance.randrange(6):
        case 0:
            at[key] = chance.choice(NUMBERS)
        case 1 if isinstance(old, int):
            at[key] = old + chance.choice((-1, 1, 2, 8))
        case 2 if isinstance(old, str):
            at[key] = flipped(old.encode(), chance).decode(errors="replace")
        case 3 if isinstance(at, list):
            at.append(json.loads(json.dumps(old)))
        case 4:
            del at[key]
        case _:
            at[key] = old * 2 if isinstance(old, str | list) else chance.choice(NUMBERS)
