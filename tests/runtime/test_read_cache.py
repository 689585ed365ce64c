"""The educational decoder of cache files reads every recorded cache as the package does."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from goldens import CACHE_MAKERS, CACHES
from onnx_kivi.runtime.backend import QuantizedBlock, RowState
from onnx_kivi.runtime.cache_file import load_state, save_state
from onnx_kivi.runtime.numpy_backend.schemes import decode_keys, decode_values
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import SdpaAttributes
from stepping import filled, sdpa

PROGRAM = Path(__file__).parents[2] / "examples" / "read_cache.py"
READ = runpy.run_path(str(PROGRAM))["read"]


def decoded(row: RowState, a: SdpaAttributes) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values (heads, tokens, channels) of a row."""
    keys, values = [row.sinks.key], [row.sinks.value]
    for block in row.blocks:
        key, value, size = block.key, block.value, row.sinks.value.shape[2]
        keys.append(decode_keys(a, key) if isinstance(key, QuantizedBlock) else key)
        values.append(decode_values(a, value, size) if isinstance(value, QuantizedBlock) else value)
    return np.concatenate([*keys, row.residual.key], 1), np.concatenate([*values, row.residual.value], 1)


@pytest.mark.parametrize("name", CACHE_MAKERS)
def test_a_recorded_cache_is_read_with_numpy_alone(name: str) -> None:
    path = CACHES / f"{name}.kivi"
    header, slots = READ(path)
    state = load_state(path)
    assert header["length"] == state.length
    assert [len(rows) for rows in slots] == [len(slot.rows) for slot in state.slots]
    for rows, slot in zip(slots, state.slots, strict=True):
        for (key, value), row in zip(rows, slot.rows, strict=True):
            expected_key, expected_value = decoded(row, slot.attributes)
            np.testing.assert_array_equal(key, expected_key)
            np.testing.assert_array_equal(value, expected_value)


def test_a_ragged_cache_with_a_window_is_read_too(tmp_path: Path) -> None:
    """As version 2 of the format holds it."""
    backend, rng = get_backend("numpy"), np.random.default_rng(0)
    nodes = [sdpa(0, spec_version=2), sdpa(1, window=5, evict=1, spec_version=2)]
    rows = [filled(backend, rng, count, nodes) for count in (21, 13)]
    state = backend.export_state(backend.gather([(handle, 0) for handle in rows]))
    assert any(row.freed for row in state.slots[1].rows)
    save_state(tmp_path / "cache", state)
    _, slots = READ(tmp_path / "cache")
    for rows, slot in zip(slots, state.slots, strict=True):
        for (key, _), row in zip(rows, slot.rows, strict=True):
            expected, begin = decoded(row, slot.attributes)[0], row.sinks.tokens
            assert np.isnan(key[:, begin : begin + row.freed]).all()
            np.testing.assert_array_equal(np.delete(key, np.s_[begin : begin + row.freed], 1), expected)


def test_the_program_lists_what_a_file_holds_and_needs_no_package() -> None:
    assert "import onnx_kivi" not in PROGRAM.read_text(encoding="utf-8")
    command = [sys.executable, "-I", str(PROGRAM), str(CACHES / "cross.kivi")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        f"{slot} {kind} [((2, 18, 6), (2, 18, 10))]" for slot, kind in enumerate(("self", "cross", "cross"))
    ]
