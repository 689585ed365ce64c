"""Attention over a quantized cache against the float64 oracle, on every backend; and the softmax taken literally."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import stepping
import vectors
from agreement import compare
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.numpy_backend.reference import attend_row
from onnx_kivi.runtime.numpy_backend.rows import append, empty_row
from onnx_kivi.spec import SdpaAttributes

LITERAL: dict[str, Any] = {"sink_length": 0, "k_bits": 32, "v_bits": 32}


@pytest.mark.parametrize("case", vectors.attend_cases(), ids=lambda case: case.name)
def test_every_feature_agrees_with_the_oracle(backend: Backend, case: vectors.AttendCase) -> None:
    compare(backend, case)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_combination_agrees_with_the_oracle(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    causal = draw(st.sampled_from([0, 1]))
    case = vectors.AttendCase(
        name="drawn",
        attributes={
            "k_bits": draw(st.sampled_from([2, 4, 8, 32])),
            "v_bits": draw(st.sampled_from([2, 4, 8])),
            "block_tokens": draw(st.integers(1, 12)),
            "v_group_size": draw(st.integers(0, 9)),
            "residual_length": draw(st.integers(0, 5)),
            "sink_length": draw(st.integers(0, 4)),
            "softcap": draw(st.sampled_from([0.0, 3.0])),
            "is_causal": causal,
            "window": draw(st.integers(1, 20)) if causal and draw(st.booleans()) else 0,
            "nan_to_zero": draw(st.sampled_from([0, 1])),
        },
        batch=draw(st.integers(1, 2)),
        q_heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        k_size=draw(st.integers(1, 20)),
        v_size=draw(st.integers(1, 20)),
        past=draw(st.integers(30, 60)),
        queries=draw(st.integers(1, 5)),
        new=draw(st.sampled_from([None, 0])),
        mask="".join(draw(st.sampled_from([letter, "1"])) for letter in "BHST") if draw(st.booleans()) else "",
        fill=draw(st.sampled_from([-np.inf, vectors.F32_MIN])),
        head_sink=draw(st.booleans()),
    )
    from onnx_kivi.runtime.select import get_backend

    compare(get_backend("numpy"), case)


def attend(backend: Backend, mask: np.ndarray, head_sink: np.ndarray = stepping.NOTHING, **options: Any) -> np.ndarray:
    """Output (1, 1, S, 2) of zero queries over three new tokens whose values tell which of them was seen."""
    node = SdpaAttributes(slot=0, **(LITERAL | options))
    queries = mask.shape[2]
    value = np.array([[[[1, 0], [0, 1], [5, 5]]]], np.float32)
    handle = backend.new_cache()
    _, ticket = backend.open_step(handle, -1, stepping.model())
    zero = np.zeros((1, 1, queries, 4), np.float32)
    output = backend.attend(ticket, node, zero, np.ones((1, 1, 3, 4), np.float32), value, mask, head_sink)
    backend.close(handle)
    return output


def test_a_row_filled_with_the_least_float_is_uniform(backend: Backend) -> None:
    output = attend(backend, np.full((1, 1, 1, 3), vectors.F32_MIN, np.float32))
    np.testing.assert_allclose(output[0, 0, 0], [2, 2], rtol=1e-6)


def test_a_row_of_minus_infinity_is_nan_or_zero(backend: Backend) -> None:
    mask = np.array([[[[-np.inf] * 3, [0, 0, -np.inf]]]], np.float32)
    output = attend(backend, mask)
    assert np.isnan(output[0, 0, 0]).all()
    np.testing.assert_allclose(output[0, 0, 1], [0.5, 0.5], rtol=1e-6)
    output = attend(backend, mask, nan_to_zero=1)
    assert output[0, 0, 0].tolist() == [0, 0]
    np.testing.assert_allclose(output[0, 0, 1], [0.5, 0.5], rtol=1e-6)


def test_a_head_sink_takes_its_share_and_holds_up_a_masked_row(backend: Backend) -> None:
    mask = np.array([[[[-np.inf] * 3, [0, 0, -np.inf]]]], np.float32)
    output = attend(backend, mask, np.array([np.log(2)], np.float32))
    assert output[0, 0, 0].tolist() == [0, 0]
    np.testing.assert_allclose(output[0, 0, 1], [0.25, 0.25], rtol=1e-6)
    no_sink = attend(backend, mask, np.array([-np.inf], np.float32))
    np.testing.assert_allclose(no_sink[0, 0, 1], [0.5, 0.5], rtol=1e-6)


def test_a_nan_score_makes_its_row_nan_as_softmax_does(backend: Backend) -> None:
    mask = np.array([[[[0, np.nan, 0], [0, 0, 0]]]], np.float32)
    output = attend(backend, mask)
    assert np.isnan(output[0, 0, 0]).all()
    np.testing.assert_allclose(output[0, 0, 1], [2, 2], rtol=1e-6)
    output = attend(backend, mask, nan_to_zero=1)
    assert output[0, 0, 0].tolist() == [0, 0]


def test_an_empty_cache_without_new_tokens_gives_zeros(backend: Backend) -> None:
    handle = backend.new_cache()
    _, ticket = backend.open_step(handle, -1, stepping.model())
    query, none = np.ones((1, 2, 3, 4), np.float32), np.zeros((1, 1, 0, 4), np.float32)
    output = backend.attend(ticket, stepping.sdpa(), query, none, none, stepping.NOTHING, stepping.NOTHING)
    backend.close(handle)
    assert output.tolist() == np.zeros((1, 2, 3, 4)).tolist()


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_scratch_does_not_grow_with_the_context(bits: int) -> None:
    """Decoding at 8 and at 32 tiles of context takes the same memory, give or take a list of block references."""
    node = SdpaAttributes(slot=0, k_bits=bits, v_bits=bits, residual_length=0, block_tokens=64, v_group_size=0)
    peaks = []
    for tiles in (8, 32):
        keys = np.ones((2, tiles * 1024 + 4, 16), np.float32)
        row = append(empty_row(2, 16, 16), node, keys, keys)
        assert len(row.blocks) == tiles * 16
        one = np.ones((2, 1, 16), np.float32)
        tracemalloc.start()
        attend_row(node, row, keys.shape[1], np.ones((4, 1, 16), np.float32), one, one, None, None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] * 1.2
    assert peaks[1] < keys.nbytes / 2
