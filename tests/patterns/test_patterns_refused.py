"""Operators that no family can rewrite are missed by name."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

import onnx_kivi as kivi
from onnx_kivi.patterns.families.refused import REFUSALS


def model_with(op: str, past: int, given: bool) -> onnx.ModelProto:
    """One node whose input `past` is a graph input, if given."""
    domain, _, name = op.rpartition(".")
    inputs = ["x", *[""] * (past - 1), "past_0" if given else ""]
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "S", 32])]
    if given:
        values.append(helper.make_tensor_value_info("past_0", TensorProto.FLOAT, ["B", 4, "P", 8]))
    node = helper.make_node(name, inputs, ["y", "present_0"], name="attention", domain=domain, num_heads=4)
    outputs = [helper.make_empty_tensor_value_info(name) for name in ("y", "present_0")]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(domain, 1)]
    return helper.make_model(helper.make_graph([node], "g", values, outputs), opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("op", REFUSALS)
def test_a_cache_in_it_is_missed_by_name(op: str) -> None:
    report = kivi.inspect(model_with(op, REFUSALS[op].past, given=True))
    assert not report.sites
    assert next(miss.reason for miss in report.misses if miss.node == "attention").startswith(f"{op}: ")
    with pytest.raises(kivi.UnsupportedModelError, match="export with GroupQueryAttention"):
        kivi.rewrite(model_with(op, REFUSALS[op].past, given=True))


@pytest.mark.parametrize("op", REFUSALS)
def test_without_a_cache_it_is_no_miss(op: str) -> None:
    report = kivi.inspect(model_with(op, REFUSALS[op].past, given=False))
    assert [miss.node for miss in report.misses] == ["model"]
