"""Errors of a rewritten graph, as edits of a sound one: what no verification may pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

QUERY, KEY, VALUE, MASK, SINK = range(5)
Array = npt.NDArray[Any]
Edit = Callable[[onnx.ModelProto], None]


def nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type.startswith("QuantizedKvSdpa")]


def set_attribute(name: str, change: Callable[[float], float], layers: slice = slice(None)) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for node in nodes(model)[layers]:
            (attribute,) = (a for a in node.attribute if a.name == name)
            if attribute.type == onnx.AttributeProto.INT:
                attribute.i = int(change(attribute.i))
            else:
                attribute.s = repr(change(float(attribute.s))).encode()

    return edit


def before(model: onnx.ModelProto, node: onnx.NodeProto, i: int, op: str, *more: Array, **attributes: Any) -> None:
    """Put a node in front of an input of another."""
    added = [f"mutant/{node.name}/{i}/{n}" for n in range(len(more))]
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for a, name in zip(more, added, strict=True))
    out = f"mutant/{node.name}/{i}"
    at = list(model.graph.node).index(node)
    model.graph.node.insert(at, helper.make_node(op, [node.input[i], *added], [out], **attributes))
    node.input[i] = out


def heads(i: int, order: list[int]) -> Edit:
    """The heads of an input in another order, in one layer."""

    def edit(model: onnx.ModelProto) -> None:
        before(model, nodes(model)[-1], i, "Gather", np.array(order), axis=1)

    return edit


def taking_turns(model: onnx.ModelProto) -> None:
    """Query head h reads kv head h % kv heads."""
    node = nodes(model)[0]
    before(model, node, QUERY, "Gather", np.array([0, 2, 1, 3]), axis=1)
    (reader,) = (n for n in model.graph.node if node.output[0] in n.input)
    before(model, reader, list(reader.input).index(node.output[0]), "Gather", np.array([0, 2, 1, 3]), axis=1)


def another_layers(i: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        first, second = nodes(model)
        second.input[i] = first.input[i]

    return edit


def same_tensor(model: onnx.ModelProto) -> None:
    """Values are taken for keys."""
    node = nodes(model)[1]
    node.input[KEY] = node.input[VALUE]


def shifted_mask(model: onnx.ModelProto) -> None:
    """The padding mask, one key late."""
    for node in nodes(model):
        before(model, node, MASK, "Pad", np.array([0, 0, 0, 1, 0, 0, 0, -1]))


def no_mask(model: onnx.ModelProto) -> None:
    for node in nodes(model):
        node.input[MASK] = node.input[SINK]


def no_window(model: onnx.ModelProto) -> None:
    for name in ("window", "evict"):
        set_attribute(name, lambda _: 0)(model)


MUTANTS: dict[str, Edit] = {
    "scale of one layer 2% off": set_attribute("scale", lambda x: x * 1.02, slice(1)),
    "scale forgotten": set_attribute("scale", lambda _: 1.0),
    "softcap dropped": set_attribute("softcap", lambda _: 0.0),
    "softcap 10% off": set_attribute("softcap", lambda x: x * 1.1, slice(1, 2)),
    "window dropped": no_window,
    "window off by one": set_attribute("window", lambda x: x + 1, slice(1)),
    "causal mask dropped": set_attribute("is_causal", lambda _: 0),
    "padding mask one key late": shifted_mask,
    "padding mask dropped": no_mask,
    "query heads swapped": heads(QUERY, [1, 0, 2, 3]),
    "key heads swapped": heads(KEY, [1, 0]),
    "value heads swapped": heads(VALUE, [1, 0]),
    "kv heads repeated in turns": taking_turns,
    "another layer's keys": another_layers(KEY),
    "another layer's values": another_layers(VALUE),
    "another layer's queries": another_layers(QUERY),
    "values for keys": same_tensor,
}
