"""Edited models: whatever our nodes say that the rewriter would not have written is refused before a session exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, helper

import onnx_kivi as kivi
from onnx_kivi.own_nodes import read_own_nodes

Edit = Callable[[ModelProto], object]


def opening(model: ModelProto) -> NodeProto:
    nodes: list[NodeProto] = [n for n in model.graph.node if n.op_type.startswith("KvCacheStep")]
    return nodes[0]


def attending(model: ModelProto) -> list[NodeProto]:
    return [n for n in model.graph.node if n.op_type.startswith("QuantizedKvSdpa")]


def attribute(node: NodeProto, name: str) -> AttributeProto:
    found: list[AttributeProto] = [a for a in node.attribute if a.name == name]
    return found[0]


def given(name: str, value: object, node: Callable[[ModelProto], NodeProto] = lambda m: attending(m)[0]) -> Edit:
    """Write another value, of whatever type, in the place of an attribute."""

    def edit(model: ModelProto) -> None:
        attribute(node(model), name).CopyFrom(helper.make_attribute(name, value))

    return edit


def layers(count: int) -> Edit:
    return given("layers", count, opening)


def in_a_branch(model: ModelProto) -> None:
    node = attending(model)[0]
    branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info(node.output[0], 1, None)])
    condition = next(t.name for t in model.graph.initializer if list(t.dims) == [])
    choice = helper.make_node("If", [condition], list(node.output), then_branch=branch, else_branch=branch)
    node.CopyFrom(choice)


def in_a_function(model: ModelProto) -> None:
    nodes = [attending(model)[0]]
    opsets = [helper.make_opsetid("onnx_kivi", 1)]
    model.functions.append(helper.make_function("mine", "Hidden", ["q"], ["o"], nodes, opsets))


def instead_of_an_operator(model: ModelProto) -> None:
    nodes = [helper.make_node("Identity", ["q"], ["o"])]
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("onnx_kivi", "QuantizedKvSdpa", ["q"], ["o"], nodes, opsets))


def twice(model: ModelProto) -> None:
    attending(model)[0].attribute.append(attribute(attending(model)[0], "scale"))


def bytes_of(name: str, value: bytes) -> Edit:
    return lambda model: setattr(attribute(attending(model)[0], name), "s", value)


EDITS: dict[str, tuple[Edit, str]] = {
    "more layers than nodes": (layers(3), "expected layers to be the number of its nodes, 2, got 3"),
    "fewer layers than nodes": (layers(1), "number of its nodes, 2, got 1"),
    "no layers": (layers(0), "layers: expected an integer"),
    "layers beyond an int64's half": (layers(2**63 - 1), "number of its nodes|layers: expected"),
    "a node left out": (lambda m: m.graph.node.remove(attending(m)[1]), "number of its nodes, 1, got 2"),
    "no step": (lambda m: m.graph.node.remove(opening(m)), "one KvCacheStep in the model, got 0"),
    "two steps": (lambda m: m.graph.node.append(opening(m)), "one KvCacheStep in the model, got 2"),
    "one slot for two": (given("slot", 1), "a slot of its own, got slot 1"),
    "a float scale": (given("scale", 0.1), "attribute scale of type string, got float"),
    "text for bits": (given("k_bits", "8"), "attribute k_bits of type int, got string"),
    "a float is_causal": (given("is_causal", 1.0), "attribute is_causal of type int, got float"),
    "a list of bits": (given("v_bits", [8, 8]), "attribute v_bits of type int, got ints"),
    "a tensor": (given("sink_length", helper.make_tensor("t", 7, [], [4])), "sink_length of type int, got tensor"),
    "text that is not UTF-8": (bytes_of("kind", b"\xff\xfeself"), "attribute kind in UTF-8, got b'.xff.xfeself'"),
    "a number that is not UTF-8": (bytes_of("scale", b"\xff"), "attribute scale in UTF-8"),
    "a number that is none": (bytes_of("scale", b"1.0\0x"), "attribute scale: expected float"),
    "an infinite scale": (bytes_of("scale", b"inf"), "scale: expected (float|a finite number)"),
    "three bits": (given("k_bits", 3), "k_bits: expected one of"),
    "another version": (given("spec_version", 3), "spec_version: expected 1 or 2, got 3"),
    "the version of another operator": (given("spec_version", 2), "expected spec_version 1, got 2"),
    "a step of version 1": (given("spec_version", 1, opening), "attribute one_length: expected one of"),
    "another version of the step": (given("spec_version", 0, opening), "spec_version: expected 1 or 2, got 0"),
    "another kind": (given("kind", "other"), "kind: expected one of self, cross, got 'other'"),
    "an attribute of no version": (
        lambda m: attending(m)[0].attribute.append(helper.make_attribute("rope", 1)),
        "expected attributes slot, .*, got 'rope'",
    ),
    "an attribute twice": (twice, "each attribute once, got scale twice"),
    "an attribute of no type": (lambda m: attribute(attending(m)[0], "slot").ClearField("type"), "type int, got none"),
    "an attribute without a value": (
        lambda m: attribute(attending(m)[0], "slot").ClearField("i"),
        "one value of attribute slot",
    ),
    "an attribute of a function": (
        lambda m: setattr(attribute(attending(m)[0], "slot"), "ref_attr_name", "x"),
        "attribute slot of type int",
    ),
    "no slot": (
        lambda m: attending(m)[0].attribute.remove(attribute(attending(m)[0], "slot")),
        "attribute slot: missing",
    ),
    "no model": (given("model_id", "", opening), "model_id: expected a non-empty string"),
    "another operator": (
        lambda m: setattr(attending(m)[0], "op_type", "Sdpa"),
        "an operator of onnx_kivi, .*, got 'Sdpa'",
    ),
    "another ticket": (lambda m: attending(m)[0].input.__setitem__(5, "cache_handle"), "the ticket of"),
    "a handle of its own": (
        lambda m: opening(m).input.__setitem__(0, "past_length"),
        "inputs cache_handle, past_length, new_length",
    ),
    "a node in a branch": (in_a_branch, "in the main graph, got a place in a subgraph"),
    "a node in a function": (in_a_function, "in the main graph, got a place in a subgraph or function"),
    "an operator that hides ours": (instead_of_an_operator, "no function in the domain onnx_kivi"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_is_refused_at_load(name: str, rewritten: Callable[[int], Path], tmp_path: Path) -> None:
    edit, words = EDITS[name]
    model = onnx.load(rewritten(8))
    edit(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    for given_as in (tmp_path, model.SerializeToString()):
        with pytest.raises((kivi.UnsupportedModelError, kivi.SpecMismatchError), match=words) as refusal:
            kivi.Session(given_as)
        assert "\n" not in str(refusal.value)
    with pytest.raises(kivi.KiviError, match=words):
        kivi.verify(rewritten(8), tmp_path)


def test_the_unedited_model_is_read_as_onnx_reads_it(rewritten: Callable[[int], Path]) -> None:
    nodes = read_own_nodes(rewritten(8))
    model = onnx.load(rewritten(8))
    assert nodes is not None
    for own, proto in zip((nodes.step, *nodes.slots), (opening(model), *attending(model)), strict=True):
        values = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        assert own.to_wire() == {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


def test_a_model_of_none_of_our_nodes_has_none(tiny: Path) -> None:
    assert read_own_nodes(tiny) is None


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\x0a\xff\xff\xff\xff\x0f", b"\x3a\x80", b"\x0b\x0c", b"\x3a\x02\x0a\x05"]
)
def test_what_is_no_message_is_refused_or_has_no_nodes(content: bytes) -> None:
    try:
        assert read_own_nodes(content) is None
    except kivi.UnsupportedModelError as error:
        assert "expected an ONNX model" in str(error)  # noqa: PT017
