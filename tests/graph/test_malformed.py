"""Models that no operator's specification allows are refused in one line, or read as far as can be; never a crash."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

import onnx
import pytest
from onnx import AttributeProto, NodeProto, TensorProto, helper

import onnx_kivi as kivi
from graphs import decoder
from zoo import MODELS


def without_inputs(node: NodeProto) -> None:
    del node.input[:]


def with_one_input(node: NodeProto) -> None:
    del node.input[1:]


def with_many_inputs(node: NodeProto) -> None:
    node.input.extend(["key"] * 9)


def without_outputs(node: NodeProto) -> None:
    del node.output[:]


def with_text_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        attribute.type, attribute.s = AttributeProto.STRING, b"x"


def with_wild_attributes(node: NodeProto) -> None:
    for attribute in node.attribute:
        attribute.i, attribute.ints[:] = 99, [9, -99, 3]


DAMAGES = (
    without_inputs,
    with_one_input,
    with_many_inputs,
    without_outputs,
    with_text_attributes,
    with_wild_attributes,
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("index", range(len(decoder().graph.node)))
def test_a_damaged_node_is_refused_or_read(damage: Callable[[NodeProto], None], index: int) -> None:
    model = decoder()
    damage(model.graph.node[index])
    with contextlib.suppress(kivi.UnsupportedModelError):
        kivi.inspect(model)


def test_what_a_node_may_have_is_said() -> None:
    model = decoder()
    without_inputs(model.graph.node[0])
    with pytest.raises(kivi.UnsupportedModelError, match=r"Concat .*: expected 1 to \d+ inputs, got 0"):
        kivi.inspect(model)
    model = decoder()
    with_text_attributes(model.graph.node[0])
    with pytest.raises(kivi.UnsupportedModelError, match="'axis' is not of the type that its operator expects"):
        kivi.inspect(model)


@pytest.mark.parametrize(
    "tensor",
    [
        TensorProto(name="strange", data_type=TensorProto.STRING, dims=[2], string_data=[b"a", b"b"]),
        TensorProto(name="strange", data_type=TensorProto.COMPLEX64, dims=[1], float_data=[1, 2]),
        helper.make_tensor("strange", TensorProto.FLOAT, [1], [float("inf")]),
        helper.make_tensor("strange", TensorProto.FLOAT, [1], [float("nan")]),
    ],
)
def test_constants_of_any_kind_are_read_over(tensor: TensorProto) -> None:
    model = decoder()
    model.graph.node.append(helper.make_node("Constant", [], ["strange"], value=tensor))
    model.graph.node.append(helper.make_node("Cast", ["strange"], ["number"], to=onnx.TensorProto.INT64))
    model.graph.node.append(helper.make_node("Reshape", ["key", "number"], ["shaped"]))
    assert len(kivi.inspect(model).sites) == 1


@pytest.mark.parametrize(
    "guard",
    [
        "a = Equal(i(1,2), i(1,2,3)) b = Where(a, i(4), i(5))",
        "a = Equal(i(1,2), i(1,2)) b = Where(i(4,4), a, i(5,5)) c = Reshape(key, b) d = Relu(c)",
        "a = Cast<to=7>(f(3.0e38)) b = Reshape(a, i(1)) c = Reshape(key, b) d = Relu(c)",
        "a = ConstantOfShape<value=int64[1] {1}>(i(-2)) b = Neg(a)",
    ],
    ids=["sizes that don't fit", "a condition as sizes", "a number beyond integers", "a negative size"],
)
def test_values_that_make_no_sense_are_unknown(guard: str) -> None:
    assert len(kivi.inspect(decoder(guard=guard)).sites) == 1


CONTRIB = {
    "genai-fp32/llama": ("GroupQueryAttention", "kv_num_heads"),
    "ortopt-optimum/whisper/decoder_with_past_model": ("MultiHeadAttention", "num_heads"),
}


@pytest.mark.parametrize("name", CONTRIB)
@pytest.mark.parametrize("value", [None, "8", 0, -1, 1.5], ids=str)
def test_attributes_that_no_schema_holds_are_checked_where_they_are_read(name: str, value: object) -> None:
    op, attribute = CONTRIB[name]
    model = onnx.load(MODELS[name])
    node = next(n for n in model.graph.node if n.op_type == op)
    node.attribute.remove(next(a for a in node.attribute if a.name == attribute))
    if value is not None:
        node.attribute.append(helper.make_attribute(attribute, value))
    reason = f"{attribute}.: expected (an integer|1 or more), got"
    assert any(re.search(reason, miss.reason) for miss in kivi.inspect(model).misses)
    with pytest.raises(kivi.UnsupportedModelError, match=reason):
        kivi.rewrite(model)
