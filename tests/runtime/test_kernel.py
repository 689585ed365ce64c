"""The native kernel on every ISA level that this machine has: codes bit for bit, attention against the float64 oracle.

Bound on attention: that of test_reference (rounding of the scores in float32, raised by the vectors' outlier channels),
plus what the kernel adds: keys times scale and probabilities times scale are rounded to 16 bits, half a step each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepping
import vectors
from agreement import compare
from onnx_kivi.runtime.backend import Backend, QuantizedBlock
from onnx_kivi.runtime.numpy_backend.quantize import quantize_keys, quantize_values
from onnx_kivi.runtime.numpy_backend.schemes import seal_keys, seal_values
from onnx_kivi.spec import SdpaAttributes
from onnx_kivi.spec_schemes import AFFINE, K_SCHEMES, SYMMETRIC, V_BITS, k_bits_of

native = pytest.importorskip("onnx_kivi._native", reason="the native library is not built")

LEVELS = native.isa_names()
MORE_CASES = [
    vectors.AttendCase("heads-8-1", q_heads=8, kv_heads=1, queries=9, k_size=64, v_size=64),
    vectors.AttendCase("large-heads", {"v_group_size": 64}, k_size=256, v_size=256, queries=2),
    vectors.AttendCase("wider-than-sums", {"v_group_size": 0}, k_size=300, v_size=300),
    vectors.AttendCase("long-blocks", {"block_tokens": 512, "v_group_size": 16}, k_size=16, v_size=16, past=1030),
    vectors.AttendCase("split-tokens", {"block_tokens": 16, "v_group_size": 32}, k_size=64, v_size=64, past=2300),
]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The native backend, at one ISA level."""
    from onnx_kivi.runtime.select import get_backend

    backend = get_backend("native")
    before = native.isa()
    native.use_isa(request.param)
    yield backend
    native.use_isa(before)


def sealed(backend: Backend, keys: np.ndarray, values: np.ndarray, **options: Any) -> tuple[object, object]:
    """Both sides of the one block that tokens (Hkv, T, D) are sealed into."""
    node = stepping.sdpa(block_tokens=keys.shape[1], sink_length=0, **options)
    handle = backend.new_cache()
    try:
        stepping.run(backend, handle, [node], keys[None], values[None])
        (row,) = backend.export_state(handle).slots[0].rows
    finally:
        backend.close(handle)
    (block,) = row.blocks
    return block.key, block.value


def assert_codes(side: object, expected: QuantizedBlock | None, dense: np.ndarray) -> None:
    """The same codes and parameters, bit for bit, or the same f32 tokens where there are none."""
    if expected is None:
        assert isinstance(side, np.ndarray)
        np.testing.assert_array_equal(side, dense)
        return
    assert isinstance(side, QuantizedBlock)
    for array, wanted in zip(side.arrays, expected.arrays, strict=True):
        assert array.shape == wanted.shape
        assert array.tobytes() == wanted.tobytes()


def assert_block(backend: Backend, tokens: np.ndarray, k: tuple[str, int], v: tuple[str, int], group_size: int) -> None:
    """Tokens as keys and as values are sealed by (scheme, bits) to what the reference makes of them."""
    options = {"k_scheme": k[0], "k_bits": k[1], "v_scheme": v[0], "v_bits": v[1], "v_group_size": group_size}
    node = SdpaAttributes.least(slot=0, block_tokens=tokens.shape[1], **options)
    key, value = sealed(backend, tokens, tokens, spec_version=2, **options)
    assert_codes(key, seal_keys(node, tokens), tokens)
    assert_codes(value, seal_values(node, tokens), tokens)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", vectors.blocks() | vectors.unquantizable_blocks())
def test_codes_are_those_of_the_reference(level: Backend, name: str, bits: int) -> None:
    tokens = (vectors.blocks() | vectors.unquantizable_blocks())[name]
    key, value = sealed(level, tokens, tokens, k_bits=bits, v_bits=bits, v_group_size=5)
    assert_codes(key, quantize_keys(tokens, bits), tokens)
    assert_codes(value, quantize_values(tokens, bits, 5), tokens)


SCHEMES = [(name, bits) for name in K_SCHEMES[1:] for bits in k_bits_of(name)]


@pytest.mark.parametrize("name", vectors.blocks() | vectors.unquantizable_blocks())
def test_codes_of_schemes_are_those_of_the_reference(level: Backend, name: str) -> None:
    tokens = (vectors.blocks() | vectors.unquantizable_blocks())[name]
    for i, (scheme, bits) in enumerate(SCHEMES):
        assert_block(level, tokens, (scheme, bits), (SYMMETRIC, V_BITS[SYMMETRIC][i % 3]), 5)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_codes_of_any_shape_are_those_of_the_reference_on_every_level(data: st.DataObject) -> None:
    from onnx_kivi.runtime.select import get_backend

    heads, tokens, size = (data.draw(st.integers(1, most)) for most in (2, 70, 90))
    group = data.draw(st.integers(0, 40))
    k = data.draw(st.sampled_from([*SCHEMES, *((AFFINE, bits) for bits in (2, 4, 8))]))
    v = data.draw(st.sampled_from([(name, bits) for name, known in V_BITS.items() for bits in known if bits < 32]))
    scale = data.draw(st.sampled_from([1e-9, 1e-3, 1.0, 300.0]))
    offset = data.draw(st.sampled_from([0.0, 1.0, -400.0]))
    x = vectors.normal("any shape", heads, tokens, size) * np.float32(scale) + np.float32(offset)
    before = native.isa()
    try:
        for name in LEVELS:
            native.use_isa(name)
            assert_block(get_backend("native"), x, k, v, group)
    finally:
        native.use_isa(before)


@pytest.mark.parametrize("case", vectors.attend_cases() + MORE_CASES, ids=lambda case: case.name)
def test_attention_agrees_with_the_oracle(level: Backend, case: vectors.AttendCase) -> None:
    compare(level, case)


def test_a_block_out_of_the_window_is_not_read(level: Backend) -> None:
    """NaN in keys and values of blocks that no query sees leaves no trace: they are skipped, not masked."""
    node = stepping.sdpa(window=10, sink_length=0, k_bits=8, v_bits=8)
    handle = level.new_cache()
    try:
        tokens = vectors.normal("window", 1, 2, 24, 6)
        tokens[:, :, :8] = np.nan
        stepping.run(level, handle, [node], tokens, tokens, query=np.ones((1, 2, 1, 6), np.float32))
        new = np.ones((1, 2, 1, 6), np.float32)
        (output,) = stepping.run(level, handle, [node], new, new)
    finally:
        level.close(handle)
    assert np.isfinite(output).all()


def test_a_nan_in_a_block_reaches_the_rows_that_see_it(level: Backend) -> None:
    """A block with NaN stays dense, and its scores are NaN as in the original graph."""
    node = stepping.sdpa(sink_length=0, k_bits=8, v_bits=8)
    handle = level.new_cache()
    try:
        tokens = vectors.normal("nan seen", 1, 2, 24, 6)
        tokens[0, 1, 5, 3] = np.nan
        stepping.run(level, handle, [node], tokens, tokens)
        new = np.ones((1, 2, 1, 6), np.float32)
        (output,) = stepping.run(level, handle, [node], new, new)
    finally:
        level.close(handle)
    assert np.isfinite(output[0, 0]).all()
    assert np.isnan(output[0, 1]).all()
