"""Cache, the user's view of a handle: the same answers as its backend's, freed once, clear when closed."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.cache import Cache
from stepping import assert_same, run, sdpa, tokens


def filled(backend: Backend, rng: np.random.Generator) -> Cache:
    cache = Cache(backend, backend.new_cache())
    run(backend, cache.handle, [sdpa(0), sdpa(1)], tokens(rng, 15, batch=2), tokens(rng, 15, batch=2))
    return cache


def test_a_cache_says_what_it_holds(backend: Backend, rng: np.random.Generator) -> None:
    cache = filled(backend, rng)
    assert (cache.length, cache.sealed_tokens) == (15, 12)
    assert cache.nbytes == backend.nbytes(cache.handle)
    assert cache.dense_nbytes == 2 * 2 * 15 * 2 * 12 * 4
    assert repr(cache) == (
        f"<Cache {cache.handle} on {backend.name}: 15 tokens, 12 sealed, "
        f"{cache.nbytes} bytes ({cache.dense_nbytes} as float32)>"
    )


def test_crop_fork_reorder_reset(backend: Backend, rng: np.random.Generator) -> None:
    cache = filled(backend, rng)
    fork = cache.fork()
    fork.crop(13)
    fork.reorder([1, 1, 0])
    assert (cache.length, fork.length) == (15, 13)
    assert len(backend.export_state(fork.handle).slots[0].rows) == 3
    cache.reset()
    assert (cache.length, cache.nbytes, fork.length) == (0, 0, 13)


def test_save_and_load(backend: Backend, rng: np.random.Generator, tmp_path: Path) -> None:
    cache = filled(backend, rng)
    cache.save(tmp_path / "cache.kv")
    loaded = Cache.load(tmp_path / "cache.kv", backend)
    assert loaded.handle != cache.handle
    assert_same(backend.export_state(loaded.handle), backend.export_state(cache.handle))


def test_a_closed_cache_refuses_everything(backend: Backend, rng: np.random.Generator, tmp_path: Path) -> None:
    cache = filled(backend, rng)
    cache.close()
    assert repr(cache) == f"<Cache {cache.handle} on {backend.name}: closed>"
    uses = [
        lambda: cache.length,
        lambda: cache.sealed_tokens,
        lambda: cache.nbytes,
        lambda: cache.dense_nbytes,
        lambda: cache.crop(1),
        cache.reset,
        cache.fork,
        lambda: cache.reorder([0]),
        lambda: cache.save(tmp_path / "cache.kv"),
        cache.close,
    ]
    for use in uses:
        with pytest.raises(CacheError, match="expected an open handle"):
            use()
    assert not any(tmp_path.iterdir())


def test_with_closes_and_so_does_the_last_reference(backend: Backend, rng: np.random.Generator) -> None:
    with filled(backend, rng) as cache:
        handle = cache.handle
    with pytest.raises(CacheError, match="expected an open handle"):
        backend.length(handle)
    with filled(backend, rng) as cache:
        cache.close()
    handle = filled(backend, rng).handle
    gc.collect()
    with pytest.raises(CacheError, match="expected an open handle"):
        backend.length(handle)
