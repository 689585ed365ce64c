"""Edits of a rewritten model that the rewriter would not have made, and what is said of each at load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnx import ModelProto, helper

Edit = Callable[[ModelProto], object]


def opening(model: ModelProto) -> Any:
    return next(n for n in model.graph.node if n.op_type.startswith("KvCacheStep"))


def attending(model: ModelProto) -> list[Any]:
    return [n for n in model.graph.node if n.op_type.startswith("QuantizedKvSdpa")]


def attribute(node: Any, name: str) -> Any:
    return next(a for a in node.attribute if a.name == name)


def given(name: str, value: object, node: Callable[[ModelProto], Any] = lambda m: attending(m)[0]) -> Edit:
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


def ghost(model: ModelProto, op: str) -> Any:
    return next(n for n in model.graph.node if n.op_type == op)


def reading(op: str, index: int, name: str) -> Edit:
    """Have a node read another tensor as one of its inputs."""

    def edit(model: ModelProto) -> None:
        (opening(model) if op == "KvCacheStepV2" else ghost(model, op)).input[index] = name

    return edit


def without(op: str) -> Edit:
    return lambda model: model.graph.node.remove(ghost(model, op))


def doubled(op: str) -> Edit:
    return lambda model: model.graph.node.append(ghost(model, op))


# Of a model with ghost I/O.
GHOST_EDITS: dict[str, tuple[Edit, str]] = {
    "no stamps": (without("CacheStamp"), "expected one CacheOpen, and one CacheStamp behind it, got .'CacheOpen'."),
    "no opening": (without("CacheOpen"), "expected one CacheOpen, and one CacheStamp behind it"),
    "stamped twice": (doubled("CacheStamp"), "got .'CacheOpen', 'CacheStamp', 'CacheStamp'."),
    "a step that is not told": (reading("KvCacheStepV2", 0, "cache_handle"), "to be a KvCacheStepV2 with inputs"),
    "no handle": (reading("CacheOpen", 0, "past_length"), "expected inputs cache_handle and past_length first"),
    "stamps of another past": (reading("CacheStamp", 4, "logits"), "expected cache_handle, the ticket of"),
    "no ticket": (reading("CacheStamp", 1, "past_length"), "expected cache_handle, the ticket of"),
    "another model's": (
        given("model_id", "other", lambda m: ghost(m, "CacheOpen")),
        "expected model_id '.*', as '.*' has, got 'other'",
    ),
    "a negative budget": (
        given("kv_bytes", -1, lambda m: ghost(m, "CacheOpen")),
        "kv_bytes: expected an integer from 0 to 1099511627776, got -1",
    ),
    "an unknown attribute": (
        lambda m: ghost(m, "CacheStamp").attribute.append(helper.make_attribute("window", 1)),
        "expected attributes model_id, kv_bytes, spec_version, got 'window'",
    ),
}
