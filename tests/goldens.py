"""Golden files: what a released version of the ops and of the cache format writes, to be written the same for ever.

`python tests/goldens.py` adds the files that are missing and changes none that is there. Tests hold NumPy, the native
core and the rewriter to them.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onnx_kivi as kivi
import vectors
from onnx_kivi.runtime.backend import Backend, QuantizedBlock
from onnx_kivi.runtime.cache_file import save_state
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import SdpaAttributes
from onnx_kivi_models.tiny import tiny_config, tiny_decoder
from stepping import run, sdpa

GOLDEN = Path(__file__).parent / "golden" / "spec-1-format-1"
CACHES, BLOCKS = GOLDEN / "caches", GOLDEN / "blocks"
ORIGINAL, REWRITTEN = GOLDEN / "model" / "original.onnx", GOLDEN / "model" / "rewritten.onnx"

TOKENS, K_SIZE, V_SIZE = 18, 6, 10
BITS, GROUP = (2, 4, 8), 4
CONFIG = kivi.KiviConfig(
    8, 4, block_tokens=16, v_group_size=6, residual_length=8, sink_length=2, layer_bits={1: (4, 2)}
)

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]


def unchanged(path: Path, actual: bytes) -> None:
    """Fail, and say what to do, unless `actual` is what `path` holds."""
    assert actual == path.read_bytes(), changed(path)


def changed(path: Path) -> str:
    """What to do about a golden file that would not be written so any more."""
    return (
        f"{path.relative_to(GOLDEN.parent)}: expected what this version has always written, got something else, and "
        "users hold files that were written so. Undo the change; or, if it is meant, make it part of a new version of "
        "the spec (VERSIONS: ops, codes, rewritten models) or of cache files (FORMAT_VERSIONS), say in CHANGELOG.md "
        "what becomes of old files, and leave this one as it is"
    )


def numbers(seed: int, *shape: int) -> FloatArray:
    """Multiples of 1/256 between -8 and 8 that no library's random generator decides."""
    scrambled = (np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(7919 * seed)) * np.uint64(2654435761)
    return ((scrambled % 2**32 >> 20) / 256 - 8).astype(np.float32).reshape(shape)


def _cache(backend: Backend, nodes: list[SdpaAttributes], *, batch: int = 1, spoil: bool = False) -> int:
    handle = backend.new_cache()
    key, value = numbers(1, batch, 2, TOKENS, K_SIZE), numbers(2, batch, 2, TOKENS, V_SIZE)
    if spoil:
        key[0, 1, 3, 2], value[0, 0, 7, 9] = np.nan, 1e9
    run(backend, handle, nodes, key, value, query=numbers(3, batch, 4, 1, K_SIZE))
    return handle


def _slots(*bits: tuple[int, int], **options: Any) -> list[SdpaAttributes]:
    return [sdpa(i, k_bits=k, v_bits=v, residual_length=3, **options) for i, (k, v) in enumerate(bits)]


def _reset(backend: Backend) -> int:
    handle = _cache(backend, _slots((8, 8)))
    backend.reset(handle)
    return handle


# Name of a cache file: what fills the cache; gives the handle.
CACHE_MAKERS: dict[str, Callable[[Backend], int]] = {
    "empty": lambda backend: backend.new_cache(),
    "reset": _reset,
    "self-8": lambda backend: _cache(backend, _slots((8, 8), scale=0.1, softcap=30.0, window=9, is_causal=1)),
    "self-4": lambda backend: _cache(backend, _slots((4, 4), block_tokens=5)),
    "self-2": lambda backend: _cache(backend, _slots((2, 2), block_tokens=3, v_group_size=0)),
    "self-32": lambda backend: _cache(backend, _slots((32, 32), sink_length=0)),
    "self-mixed": lambda backend: _cache(backend, _slots((4, 2), (2, 32), (32, 8), (8, 4))),
    "self-rows": lambda backend: _cache(backend, _slots((8, 4), (2, 2)), batch=3),
    "self-unquantizable": lambda backend: _cache(backend, _slots((2, 2), (4, 4), (8, 8)), spoil=True),
    "cross": lambda backend: _cache(
        backend, [sdpa(0), sdpa(1, kind="cross", k_bits=4), sdpa(2, kind="cross", k_bits=32, v_bits=2)]
    ),
}


def made_bytes(backend: Backend, name: str) -> bytes:
    """The file that the cache of this name is saved as when `backend` fills it."""
    return cache_bytes(backend, CACHE_MAKERS[name](backend))


def cache_bytes(backend: Backend, handle: int) -> bytes:
    """The file that a cache is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.kivi"
        save_state(path, backend.export_state(handle))
        return path.read_bytes()


def block_inputs() -> dict[str, FloatArray]:
    """Tokens (Hkv, T, D) of each recorded block; 7 tokens and 10 channels leave short bytes and a short group."""
    plain = vectors.normal("golden", 2, 7, 10)
    hard = plain.copy()
    hard[..., 0] += 400
    hard[..., 1] *= 1e-6
    hard[..., 2] = 400 + plain[..., 2] * 1e-4
    hard[..., 3] = 400
    nan = plain.copy()
    nan[1, 3, 5] = np.nan
    outliers = vectors.outlier_channels("golden outliers", 2, 7, 10)
    return {"normal": plain, "outlier-channels": outliers, "offset-400-and-range-1e-6": hard, "nan": nan}


def sealed(backend: Backend, tokens: FloatArray, bits: int) -> dict[str, Array]:
    """The arrays by name of the block that `backend` seals tokens (Hkv, T, D) into, as keys and as values."""
    node = sdpa(k_bits=bits, v_bits=bits, block_tokens=tokens.shape[1], sink_length=0, v_group_size=GROUP)
    handle = backend.new_cache()
    run(backend, handle, [node], tokens[None], tokens[None])
    (row,) = backend.export_state(handle).slots[0].rows
    backend.close(handle)
    (block,) = row.blocks
    return _arrays("key", bits, block.key) | _arrays("value", bits, block.value)


def _arrays(name: str, bits: int, side: QuantizedBlock | FloatArray) -> dict[str, Array]:
    if isinstance(side, QuantizedBlock):
        return {f"{name}_{part}_{bits}": getattr(side, part) for part in ("codes", "lo", "scale")}
    return {f"{name}_dense_{bits}": side}


def _block_bytes(tokens: FloatArray) -> bytes:
    arrays: dict[str, Any] = {"tokens": tokens}
    for bits in BITS:
        arrays |= sealed(get_backend("numpy"), tokens, bits)
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def rewritten_bytes() -> bytes:
    """The recorded model, rewritten."""
    return bytes(kivi.rewrite(ORIGINAL, CONFIG)[0].SerializeToString(deterministic=True))


def _original_bytes() -> bytes:
    config = tiny_config(hidden=16, heads=2, kv_heads=1, head_size=10, feed_forward=16, vocabulary=32)
    return bytes(tiny_decoder(config).SerializeToString(deterministic=True))


def main() -> None:
    """Write the files that are missing."""
    numpy = get_backend("numpy")
    makers: dict[Path, Callable[[], bytes]] = {ORIGINAL: _original_bytes, REWRITTEN: rewritten_bytes}
    makers |= {BLOCKS / f"{name}.npz": partial(_block_bytes, tokens) for name, tokens in block_inputs().items()}
    makers |= {CACHES / f"{name}.kivi": partial(made_bytes, numpy, name) for name in CACHE_MAKERS}
    for path, make in makers.items():
        name = path.relative_to(GOLDEN.parent)
        if path.exists():
            print(f"kept {name}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make())
        print(f"added {name}")


if __name__ == "__main__":
    main()
