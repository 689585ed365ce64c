"""Recorded caches and blocks: every backend fills, reads and writes them to the same bytes for ever."""

from __future__ import annotations

import numpy as np
import pytest

from goldens import (
    BITS,
    BLOCKS,
    CACHE_MAKERS,
    CACHES,
    GOLDEN,
    block_inputs,
    cache_bytes,
    changed,
    made_bytes,
    sealed,
    unchanged,
)
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.cache_file import load_state

MOST_BYTES = 300_000


@pytest.mark.parametrize("name", CACHE_MAKERS)
def test_the_same_tokens_leave_the_recorded_cache(backend: Backend, name: str) -> None:
    unchanged(CACHES / f"{name}.kivi", made_bytes(backend, name))


@pytest.mark.parametrize("name", CACHE_MAKERS)
def test_a_recorded_cache_is_saved_again_as_it_was(backend: Backend, name: str) -> None:
    path = CACHES / f"{name}.kivi"
    unchanged(path, cache_bytes(backend, backend.import_state(load_state(path))))


@pytest.mark.parametrize("name", [name for name in CACHE_MAKERS if name not in {"empty", "reset", "self-32"}])
def test_a_recorded_cache_holds_sealed_tokens(backend: Backend, name: str) -> None:
    assert backend.sealed_tokens(backend.import_state(load_state(CACHES / f"{name}.kivi"))) > 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", block_inputs())
def test_recorded_tokens_are_sealed_to_the_recorded_codes(backend: Backend, name: str, bits: int) -> None:
    path = BLOCKS / f"{name}.npz"
    with np.load(path) as file:
        recorded = dict(file)
    expected = {name: array for name, array in recorded.items() if name.endswith(f"_{bits}")}
    actual = sealed(backend, recorded["tokens"], bits)
    assert actual.keys() == expected.keys(), changed(path)
    for part, array in actual.items():
        assert array.dtype == expected[part].dtype, changed(path)
        assert array.tobytes() == expected[part].tobytes(), f"{part}: {changed(path)}"


def test_a_block_with_nan_is_recorded_as_dense() -> None:
    with np.load(BLOCKS / "nan.npz") as file:
        assert {name for name in file if "codes" in name} == set()
        assert len([name for name in file if "dense" in name]) == 2 * len(BITS)


def test_the_recorded_files_are_those_that_the_tests_know_and_small() -> None:
    assert {path.stem for path in CACHES.iterdir()} == {*CACHE_MAKERS}
    assert {path.stem for path in BLOCKS.iterdir()} == {*block_inputs()}
    assert sum(path.stat().st_size for path in GOLDEN.parent.rglob("*") if path.is_file()) < MOST_BYTES
