"""The builder of nodes: spellings of each opset, names of each policy, and equal parts made once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from onnx_kivi.graph import ELEMENT_CODES, Builder, FreeNames, HashedNames, NewConstant, NewNode


def built(opset: int) -> Builder:
    return Builder(opset, HashedNames())


def only_node(builder: Builder) -> NewNode:
    (node,) = (part for part in builder.parts if isinstance(part, NewNode))
    return node


@pytest.mark.parametrize(("op", "method"), [("Squeeze", "squeeze"), ("Unsqueeze", "unsqueeze")])
def test_axes_are_an_attribute_before_opset_13_and_an_input_from_then_on(op: str, method: str) -> None:
    old, new = built(12), built(13)
    for builder in (old, new):
        getattr(builder, method)("x", 1, 2)
        assert only_node(builder).op == op
    assert only_node(old).inputs == ("x",)
    assert only_node(old).attributes == (("axes", (1, 2)),)
    assert only_node(new).inputs == ("x", new.ints(1, 2))
    assert not only_node(new).attributes


def test_sizes_of_a_split_follow_the_opset_too() -> None:
    old, new = built(12), built(13)
    parts = [builder.split("x", 1, 2, 3) for builder in (old, new)]
    assert [len(set(names)) for names in parts] == [2, 2]
    assert dict(only_node(old).attributes) == {"axis": 1, "split": (2, 3)}
    assert only_node(new).inputs == ("x", new.ints(2, 3))


def test_what_is_computed_alike_is_made_once_under_one_name() -> None:
    one, other = built(18), built(18)
    assert one.node("Add", "x", one.ints(1)) == other.node("Add", "x", other.ints(1))
    assert one.node("Add", "x", one.ints(1)) != one.node("Add", "x", one.ints(2))
    assert one.node("Cast", "x", to=1) != one.node("Cast", "x", to=7)
    count = len(one.parts)
    one.node("Add", "x", one.ints(2))
    assert len(one.parts) == count


def test_free_names_avoid_those_in_use() -> None:
    builder = Builder(18, FreeNames({"onnx_kivi/relu"}))
    assert [builder.node("Relu", "x") for _ in range(2)] == ["onnx_kivi/relu.2", "onnx_kivi/relu.3"]


@pytest.mark.parametrize(
    ("values", "element", "expected"),
    [
        ((), "float", np.zeros(0, np.float32)),
        ((1, -1), "int64", np.array([1, -1])),
        (0.5, "float16", np.array(0.5, np.float16)),
        (-1e39, "float", np.array(-np.inf, np.float32)),
    ],
)
def test_constants_have_the_type_they_are_asked_for(values: Any, element: str, expected: Any) -> None:
    builder = built(18)
    name = builder.constant(values, element)
    (part,) = builder.parts
    assert isinstance(part, NewConstant)
    proto = part.proto()
    array = onnx.numpy_helper.to_array(proto)
    assert (proto.name, proto.data_type) == (name, ELEMENT_CODES[element])
    np.testing.assert_array_equal(array, expected, strict=True)


def test_the_last_node_can_be_given_a_tensor_s_own_name() -> None:
    builder = built(18)
    builder.node("Relu", "x")
    builder.rename_last("y")
    assert only_node(builder).proto().output == ["y"]


def test_another_builder_s_parts_are_taken_with_their_inputs_renamed() -> None:
    one, other = built(18), built(18)
    one.node("Add", "past", one.ints(1))
    other.take(one.parts, {"past": "length"})
    assert only_node(other).inputs == ("length", one.ints(1))
    assert len(other.parts) == len(one.parts)
