"""The family `tensor_scatter`: buffers of fixed size, written in order, give way to a cache; other uses are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_kivi as kivi
from graphs import decoder, feeds, replay

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order
GONE: dict[str, Any] = dict.fromkeys(("repeat_key", "repeat_value", "transpose", "product", "scale", "mask", "softmax"))
INPUTS = {
    "mask": None,
    "past_key": "float[B,2,16,8] past_0_key",
    "past_value": "float[B,2,16,8] past_0_value",
    "held": "int64[B] held",
    "written": "int64[B] written",
}
OUTPUTS = {"present_key": "float[B,2,16,8] present_0_key", "present_value": "float[B,2,16,8] present_0_value"}


def scatter(
    attributes: str = "is_causal=1",
    mask: str = "",
    inputs: Mapping[str, str | None] | None = None,
    outputs: Mapping[str, str | None] | None = None,
    front: str = "",
    **lines: str | None,
) -> onnx.ModelProto:
    """A one-node decoder over two buffers of 16 tokens."""
    defaults = {
        "join_key": "present_0_key = TensorScatter<axis=2>(past_0_key, key, written)",
        "join_value": "present_0_value = TensorScatter(past_0_value, value, written)",
        "values": f"""{front} out = Attention<{attributes}>(
            query, present_0_key, present_0_value, {mask}, , , held)""",
    }
    return decoder(
        opset=24,
        inputs={**INPUTS, **(inputs or {})},
        outputs={**OUTPUTS, **(outputs or {})},
        **(GONE | defaults | lines),
    )


SPELLINGS: dict[str, dict[str, Any]] = {
    "causal": {},
    "scale, softcap": {"attributes": "is_causal=1, scale=0.3, softcap=1.5"},
    "float mask over the buffer": {
        "inputs": {"more": "float[B,1,S,16] more"},
        "mask": "more",
        "attributes": "is_causal=1",
    },
    "boolean mask over the buffer": {
        "inputs": {"more": "float[B,1,S,16] more"},
        "front": "shown = Greater(more, f(-1))",
        "mask": "shown",
        "attributes": "is_causal=0",
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_give_the_original_s_result(name: str, tmp_path: Path) -> None:
    model = scatter(**SPELLINGS[name])
    report = kivi.inspect(model)
    assert not report.misses
    assert report.sites[0].family == "tensor_scatter"
    for expected, got in replay(model, tmp_path):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


@pytest.mark.parametrize(
    ("change", "demand"),
    [
        ({"written": np.array([0, 2])}, "tokens_must_be_written_where_the_cache_ends"),
        ({"held": np.array([3, 5])}, "rows_must_be_of_one_length"),
    ],
    ids=["a row written elsewhere", "a row of another length"],
)
def test_runs_that_the_cache_can_t_follow_stop(change: dict[str, Any], demand: str, tmp_path: Path) -> None:
    model = scatter()
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], tmp_path / "model.onnx")
    session = kivi.Session(tmp_path / "model.onnx")
    new = feeds(np.random.default_rng(0), 0, 5, model)
    with pytest.raises(Exception, match=demand):  # onnxruntime has a class of its own for each status
        session.run(["out"], new | change)
    assert np.isfinite(session.run(["out"], new)[0]).all()


def test_a_shape_of_the_buffer_keeps_its_size(tmp_path: Path) -> None:
    model = scatter(front="sizes = Shape(present_0_key)", outputs={"sizes": "int64[4] sizes"})
    rewritten = kivi.rewrite(model)[0]
    kivi.save(rewritten, tmp_path / "model.onnx")
    new = feeds(np.random.default_rng(0), 0, 5, model)
    (sizes,) = kivi.Session(tmp_path / "model.onnx").run(["sizes"], new)
    assert sizes.tolist() == [2, 2, 16, 8]


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "circular": (
        {"join_key": 'present_0_key = TensorScatter<axis=2, mode="circular">(past_0_key, key, written)'},
        "expected a linear buffer",
    ),
    "not told how much it holds": (
        {"values": "out = Attention(query, present_0_key, present_0_value)"},
        "no nonpad_kv_seqlen",
    ),
    "written at 0": (
        {"join_value": "present_0_value = TensorScatter(past_0_value, value)"},
        "no write indices",
    ),
    "values joined in another way": (
        {
            "inputs": {"past_value": "float[B,2,P,8] past_0_value"},
            "outputs": {"present_value": "float[B,2,T,8] present_0_value"},
            "join_value": "present_0_value = Concat<axis=2>(past_0_value, value)",
        },
        "expected values from a buffer",
    ),
    "scores as an output": (
        {
            "values": "out, , , more = Attention(query, present_0_key, present_0_value, , , , held)",
            "outputs": {"more": "float[B,4,S,16] more"},
        },
        "the scores are an output",
    ),
    "attention written out": (
        {
            "transpose": "kt = Transpose<perm=[0,1,3,2]>(present_0_key)",
            "inputs": {"query": "float[B,2,S,8] query", "held": None},
            "product": "scores = MatMul(query, kt)",
            "softmax": "weights = Softmax<axis=-1>(scores)",
            "values": "out = MatMul(weights, present_0_value)",
        },
        "buffer of fixed size",
    ),
    "ScatterElements": (
        {
            "inputs": {"at": "int64[B,2,S,8] at"},
            "join_key": "present_0_key = ScatterElements<axis=2>(past_0_key, at, key)",
        },
        "expected a buffer that TensorScatter writes to",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    report = kivi.inspect(scatter(**changes))
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report
