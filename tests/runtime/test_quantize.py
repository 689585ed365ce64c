"""Blocks to codes and back: error bounds, exact packing, what stays dense, and the bare primitive."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import oracle
import vectors
from onnx_kivi.errors import ConfigError
from onnx_kivi.runtime.backend import QuantizedBlock
from onnx_kivi.runtime.numpy_backend import quantize
from onnx_kivi.runtime.numpy_backend.quantize import quant_dequant
from onnx_kivi.runtime.numpy_backend.schemes import decode_keys, decode_values
from onnx_kivi.spec import SdpaAttributes
from onnx_kivi.spec_schemes import packed_size

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

BITS = (2, 4, 8)
FLOATS = st.floats(-60000, 60000, width=32)
BLOCKS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=9), elements=FLOATS)


def keys_of(block: Floats, bits: int) -> QuantizedBlock:
    side = quantize.quantize_keys(block, bits)
    assert side is not None
    return side


def decoded_keys(side: QuantizedBlock, bits: int, tokens: int) -> Floats:
    return decode_keys(SdpaAttributes(slot=0, k_bits=bits, block_tokens=tokens), side)


def decoded_values(side: QuantizedBlock, bits: int, size: int, group_size: int) -> Floats:
    return decode_values(SdpaAttributes(slot=0, v_bits=bits, v_group_size=group_size), side, size)


def assert_half_a_step(
    x: Floats, decoded: Floats, scale_per_element: Doubles, lo_per_element: Doubles, bits: int
) -> None:
    """|x - decoded| <= scale / 2, and one float32 rounding each of x - lo, of the quotient and of the decoded value."""
    rounding = np.abs(x) + np.abs(lo_per_element) + scale_per_element * 2.0**bits
    bound = scale_per_element / 2 + rounding * np.finfo(np.float32).eps
    assert np.all(np.abs(decoded.astype(np.float64) - x) <= bound)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(block=BLOCKS)
def test_keys_keep_half_a_step_per_channel(bits: int, block: Floats) -> None:
    side = keys_of(block, bits)
    lo, scale = side.lo[:, None, :].astype(np.float64), side.scale[:, None, :].astype(np.float64)
    assert np.all(lo <= block)
    assert_half_a_step(block, decoded_keys(side, bits, block.shape[1]), scale, lo, bits)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=60, deadline=None)
@given(block=BLOCKS, group_size=st.integers(0, 10))
def test_values_keep_half_a_step_per_token_and_group(bits: int, block: Floats, group_size: int) -> None:
    side = quantize.quantize_values(block, bits, group_size)
    assert side is not None
    group = np.arange(block.shape[2]) // (group_size or block.shape[2])
    lo, scale = side.lo.astype(np.float64)[..., group], side.scale.astype(np.float64)[..., group]
    assert np.all(lo <= block)
    assert_half_a_step(block, decoded_values(side, bits, block.shape[2], group_size), scale, lo, bits)


@pytest.mark.parametrize("name", vectors.blocks())
@pytest.mark.parametrize("bits", BITS)
def test_hard_blocks_keep_half_a_step(name: str, bits: int) -> None:
    block = vectors.blocks()[name]
    keys, values = quantize.quantize_keys(block, bits), quantize.quantize_values(block, bits, 16)
    assert keys is not None
    assert values is not None
    lo, scale = keys.lo[:, None, :].astype(np.float64), keys.scale[:, None, :].astype(np.float64)
    assert_half_a_step(block, decoded_keys(keys, bits, block.shape[1]), scale, lo, bits)
    group = np.arange(block.shape[2]) // 16
    lo, scale = values.lo.astype(np.float64)[..., group], values.scale.astype(np.float64)[..., group]
    assert_half_a_step(block, decoded_values(values, bits, block.shape[2], 16), scale, lo, bits)


def test_an_offset_costs_no_more_than_float16_parameters_must() -> None:
    """At offset 400 float16 has steps of 0.25: lo is off by less, and the range grows by no more than that."""
    block = vectors.blocks()["offset-400"]
    decoded = decoded_keys(keys_of(block, 8), 8, block.shape[1])
    step = (np.ptp(block, axis=1) + 0.25) / 255
    assert np.all(np.abs(decoded - block).max(axis=1) <= step / 2 * 1.01 + 400 * np.finfo(np.float32).eps)


def test_parameters_are_the_tightest_float16_outward() -> None:
    block = vectors.blocks()["offset-400"]
    side = keys_of(block, 4)
    smallest, largest = block.min(axis=1), block.max(axis=1)
    assert np.all(np.nextafter(side.lo, np.float16(np.inf)).astype(np.float32) > smallest)
    exact_scale = (largest - side.lo.astype(np.float32)) / np.float32(15)
    assert np.all(side.scale >= exact_scale)
    assert np.all(np.nextafter(side.scale, np.float16(0)).astype(np.float32) < exact_scale)


def test_a_constant_group_has_the_smallest_normal_scale_and_a_zero_lo_has_no_sign() -> None:
    constant = keys_of(vectors.blocks()["zero"], 8)
    assert np.all(constant.scale == np.finfo(np.float16).smallest_normal)
    signed = quantize.quantize_values(vectors.blocks()["negative-zero"], 8, 0)
    assert signed is not None
    assert not np.signbit(signed.lo).any()


@pytest.mark.parametrize("name", vectors.unquantizable_blocks())
def test_what_float16_cannot_hold_is_not_quantized(name: str) -> None:
    block = vectors.unquantizable_blocks()[name]
    assert quantize.quantize_keys(block, 8) is None
    assert quantize.quantize_values(block, 8, 8) is None


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=st.sampled_from((*BITS, 3)))
def test_packing_is_exact_lowest_bits_first_and_padded_with_zeros(data: st.DataObject, bits: int) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=11))
    codes = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 2**bits - 1)))
    packed = quantize.pack(codes, bits)
    assert packed.shape == (*shape[:-1], packed_size(shape[-1], bits))
    np.testing.assert_array_equal(oracle.codes(packed, bits, shape[-1]), codes)
    np.testing.assert_array_equal(quantize.unpack(packed, bits, shape[-1]), codes)
    spare = packed.shape[-1] * 8 - shape[-1] * bits
    assert not np.unpackbits(packed, axis=-1, bitorder="little")[..., packed.shape[-1] * 8 - spare :].any()


def test_packed_bytes_are_what_the_format_says() -> None:
    assert quantize.pack(np.array([1, 2, 3, 0, 2], np.uint8), 2).tolist() == [0b00111001, 0b10]
    assert quantize.pack(np.array([5, 10, 15], np.uint8), 4).tolist() == [0xA5, 0x0F]
    assert quantize.pack(np.array([1, 2, 7, 4], np.uint8), 3).tolist() == [0b11010001, 0b1001]


def test_outlier_channels_need_keys_per_channel() -> None:
    """Qwen2.5-like key biases at 4 bits: scores from per-channel keys are several times closer than from per-token."""
    keys = vectors.outlier_channels("outlier scores", 1, 64, 64)
    query = vectors.normal("outlier query", 16, 64)
    per_channel = decoded_keys(keys_of(keys, 4), 4, 64)
    per_token = quant_dequant(keys, 4, axis=-1)
    error = [np.abs(query @ (decoded[0] - keys[0]).T).mean() for decoded in (per_channel, per_token)]
    assert error[0] * 8 < error[1]


@pytest.mark.parametrize("low", [0.0, -1.0])
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_quant_dequant_spans_float32(low: float, bits: int) -> None:
    largest = np.finfo(np.float32).max
    x = np.array([low * largest, largest], np.float32)
    np.testing.assert_array_equal(quant_dequant(x, bits, 0), x)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), bits=st.integers(1, 16))
def test_quant_dequant_keeps_half_a_step_of_its_group(data: st.DataObject, bits: int) -> None:
    x = data.draw(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(max_dims=3, max_side=8),
            elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
        )
    )
    axis = data.draw(st.integers(-x.ndim, x.ndim - 1))
    decoded = quant_dequant(x, bits, axis)
    exact = x.astype(np.float64)
    step = np.ptp(exact, axis=axis, keepdims=True) / (2**bits - 1)
    largest = np.abs(exact).max(axis=axis, keepdims=True)
    result_rounding = largest * np.finfo(np.float32).eps + np.finfo(np.float32).smallest_subnormal
    assert decoded.dtype == np.float32
    assert decoded.shape == x.shape
    assert np.all(np.abs(decoded - exact) <= step / 2 * (1 + 1e-6) + result_rounding)


def test_quant_dequant_error_falls_with_each_bit() -> None:
    x = vectors.normal("falling", 64, 128)
    errors = [np.abs(quant_dequant(x, bits, axis=0) - x).max() for bits in range(1, 17)]
    assert all(more > less for more, less in itertools.pairwise(errors))


def test_quant_dequant_reduces_over_axis() -> None:
    """Each column is one group when axis 0 is reduced: scaling a column changes no other."""
    x = vectors.normal("axis", 16, 4)
    scaled = x * np.array([1, 1000, 1, 1], np.float32)
    np.testing.assert_array_equal(
        quant_dequant(scaled, 4, axis=0)[:, [0, 2, 3]], quant_dequant(x, 4, axis=0)[:, [0, 2, 3]]
    )
    assert len(np.unique(quant_dequant(x, 2, axis=0)[:, 0])) <= 4


def test_quant_dequant_leaves_a_group_that_is_not_finite() -> None:
    x = vectors.normal("not finite", 8, 4)
    x[2, 1], x[3, 2] = np.nan, np.inf
    decoded = quant_dequant(x, 2, axis=0)
    np.testing.assert_array_equal(decoded[:, 1:3], x[:, 1:3])
    assert np.all(np.isfinite(decoded[:, [0, 3]]))
    assert not np.array_equal(decoded[:, 0], x[:, 0])


@pytest.mark.parametrize(("bits", "axis"), [(0, 0), (17, 0), (8.0, 0), (True, 0), (8, 2), (8, -3)])
def test_quant_dequant_refuses_other_bits_and_axes(bits: int, axis: int) -> None:
    with pytest.raises(ConfigError, match=r"quant_dequant: (bits|axis): expected"):
        quant_dequant(np.zeros((2, 2), np.float32), bits, axis)
