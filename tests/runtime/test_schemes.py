"""Schemes of version 2: what each promises, the order of its sums, and what stays dense."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import oracle
import vectors
from onnx_kivi.runtime.numpy_backend.schemes import decode_keys, decode_values, key_codes, seal_keys, seal_values
from onnx_kivi.runtime.numpy_backend.sums import lane_sum, rotated
from onnx_kivi.spec import SdpaAttributes
from onnx_kivi.spec_schemes import K_SCHEMES, SYMMETRIC, V_BITS, k_bits_of, key_scheme

Floats = npt.NDArray[np.float32]


def node(tokens: int, **options: Any) -> SdpaAttributes:
    return SdpaAttributes.least(slot=0, block_tokens=tokens, **options)


def key_error(keys: Floats, **options: Any) -> float:
    """Mean squared error of a block of keys."""
    attributes = node(keys.shape[1], **options)
    block = seal_keys(attributes, keys)
    assert block is not None
    return float(np.mean((decode_keys(attributes, block) - keys) ** 2))


def value_error(values: Floats, **options: Any) -> float:
    attributes = node(values.shape[1], **options)
    block = seal_values(attributes, values)
    assert block is not None
    return float(np.mean((decode_values(attributes, block, values.shape[2]) - values) ** 2))


@pytest.mark.parametrize("size", [1, 2, 5, 64, 80, 96, 128])
def test_a_rotation_is_that_of_the_oracle_and_undoes_itself(size: int) -> None:
    x = vectors.normal("rotation", 3, size)
    np.testing.assert_allclose(rotated(x), x @ oracle.hadamard(size), rtol=0, atol=1e-5)
    np.testing.assert_allclose(rotated(rotated(x)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100])
def test_a_sum_is_of_sixteen_lanes_in_order(count: int) -> None:
    x = vectors.normal("lanes", count) * np.float32(1e3)
    lanes = [np.float32(0)] * 16
    for i, term in enumerate(x):
        lanes[i % 16] = lanes[i % 16] + term
    for half in (8, 4, 2, 1):
        lanes = [lanes[i] + lanes[i + half] for i in range(half)]
    assert lane_sum(x) == lanes[0]


def test_digits_go_where_they_lower_the_error_most() -> None:
    """Two channels that spread most get three digits each, those that hardly vary none."""
    keys = vectors.normal("digits", 1, 32, 16) * np.float32(0.01)
    keys[..., 3] *= 3000
    keys[..., 9] *= 2000
    attributes = node(32, k_bits=2, k_scheme="digits:2")
    block = seal_keys(attributes, keys)
    assert block is not None
    digits = oracle.codes(block.digits, 2, 16)[0]
    assert digits.sum() == 16
    assert digits[3] == digits[9] == 3
    assert key_codes(attributes, block).codes[0, 3].max() == 63


@pytest.mark.parametrize("scheme", [name for name in K_SCHEMES if name.startswith("digits")])
def test_digits_beat_a_code_for_each_channel_where_channels_differ(scheme: str) -> None:
    keys = vectors.normal("unequal", 2, 64, 64) * np.geomspace(0.05, 5, 64).astype(np.float32)
    assert key_error(keys, k_bits=2, k_scheme=scheme) * 2 < key_error(keys, k_bits=2)


@pytest.mark.parametrize("scheme", ["affine", "digits:2.25"])
def test_token_scales_help_where_tokens_differ(scheme: str) -> None:
    keys = vectors.normal("sizes", 2, 64, 64) * np.geomspace(0.1, 10, 64).astype(np.float32)[:, None]
    assert key_error(keys, k_bits=2, k_scheme=f"{scheme}+token") * 1.5 < key_error(keys, k_bits=2, k_scheme=scheme)


def test_rotated_keys_share_what_one_channel_would_have_to_bear() -> None:
    keys = vectors.normal("spikes", 1, 64, 64)
    keys[0, np.arange(64), np.arange(64)] += 8
    errors = [key_error(keys, k_bits=4, k_scheme=f"affine+token{more}") for more in ("+rotated", "")]
    assert errors[0] * 2 < errors[1]


@pytest.mark.parametrize(("bits", "most"), [(2, 0.125), (3, 0.037), (4, 0.0105)])
def test_symmetric_values_keep_a_known_share_of_the_square(bits: int, most: float) -> None:
    """The best scale of normal numbers leaves 0.119, 0.0374 and 0.0115 of their square; groups of 64 leave less."""
    values = vectors.normal("normals", 2, 64, 64)
    assert value_error(values, v_bits=bits, v_scheme=SYMMETRIC) < most * float(np.mean(values**2))


def test_zeros_stay_zeros() -> None:
    zero = np.zeros((1, 16, 24), np.float32)
    assert value_error(zero, v_bits=2, v_scheme=SYMMETRIC) == 0
    assert value_error(np.full_like(zero, 1e-30), v_bits=3, v_scheme=SYMMETRIC) < 1e-50
    assert all(key_error(zero, k_bits=2, k_scheme=name) == 0 for name in K_SCHEMES)


@pytest.mark.parametrize("name", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_not_coded(name: str) -> None:
    block = vectors.unquantizable_blocks()[name]
    for scheme in K_SCHEMES:
        assert seal_keys(node(16, k_bits=k_bits_of(scheme)[0], k_scheme=scheme), block) is None
    for bits in V_BITS[SYMMETRIC]:
        assert seal_values(node(16, v_bits=bits, v_scheme=SYMMETRIC), block) is None


def test_a_number_beyond_what_a_parameter_can_hold_is_not_coded() -> None:
    block = vectors.normal("beyond", 1, 16, 24) * np.float32(1e8)
    assert seal_keys(node(16, k_bits=2, k_scheme="digits:2"), block) is None
    assert seal_values(node(16, v_bits=2, v_scheme=SYMMETRIC), block) is None
    assert seal_keys(node(16, k_bits=4, k_scheme="affine+token"), block * np.float32(1e29)) is None


def test_the_number_of_digits_is_rounded_to_even() -> None:
    digits = [key_scheme("digits:2.25").digits(size) for size in (1, 4, 12, 64, 80)]
    assert digits == [1, 4, 14, 72, 90]
    assert key_scheme("affine+token").digits(64) == 0
