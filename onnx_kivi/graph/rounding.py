"""Copies of a model that differ from it by rounding alone: none to 8 bits inside, or one bit more of it.

A model that rounds activations to 8 bits turns a last bit of difference into a step of 1/127, and that into others
behind it, so no sound change of it can be told from a small error. Without that rounding both are as far apart as in
any float model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import onnx
from onnx import helper

from .build import FreeNames
from .edit import copied, replace_all
from .view import Graph, Model, Node, elements

NUDGE = 1 + 2.0**-22
INT8_ACCURACY_LEVEL, FLOAT_ACCURACY_LEVEL = 4, 1
QUANTIZE = ("QuantizeLinear", "com.microsoft.QuantizeLinear")
DEQUANTIZE = ("DequantizeLinear", "com.microsoft.DequantizeLinear")
ROUNDING = (
    *("DynamicQuantizeLinear", "com.microsoft.DynamicQuantizeMatMul", "com.microsoft.MatMulIntegerToFloat"),
    *("com.microsoft.QAttention", "QLinearMatMul", "com.microsoft.QGemm"),
)
MOVING = ("Identity", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Gather")

Nodes = list[onnx.NodeProto]


def rounds_activations(graph: Graph) -> bool:
    """Whether the model rounds activations to 8 bits as it runs."""
    return any(
        node.op in ROUNDING
        or (node.op in QUANTIZE and not _is_weight(graph, node.input(0)))
        or (node.op == "com.microsoft.MatMulNBits" and node.attr("accuracy_level", 0) == INT8_ACCURACY_LEVEL)
        for node in graph.nodes
    )


def unrounded(model: Model) -> Model | None:
    """A copy whose activations stay float where the model has them in 8 bits; None where that can't be said."""
    result = copied(model)
    graph = Graph(result)
    writer = _Writer(graph)
    nodes: Nodes = []
    for node in graph.nodes:
        written = writer.write(node)
        if written is None:
            return None
        nodes += written
    replace_all(result.graph.node, nodes)
    del result.graph.value_info[:]
    return None if rounds_activations(Graph(result)) else result


def nudged(model: Model, tensors: Collection[str]) -> Model:
    """A copy in which these float tensors are two units in the last place larger: what rounding may do to them."""
    result = copied(model)
    names = FreeNames(Graph(model).tensor_names)
    factor = names.tensor("nudge")
    result.graph.initializer.append(helper.make_tensor(factor, onnx.TensorProto.FLOAT, [], [NUDGE]))
    nodes: Nodes = []
    for node in result.graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name in tensors:
                node.output[i] = names.tensor("plain")
                nodes.append(helper.make_node("Mul", [node.output[i], factor], [name]))
    replace_all(result.graph.node, nodes)
    return result


class _Writer:
    """Writes nodes anew for operands that are float, in place of integers that were rounded to."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._names = FreeNames(graph.tensor_names)
        self._float: set[str] = set()
        self._rules: dict[str, Callable[[Node], Iterator[onnx.NodeProto]]] = {
            "com.microsoft.MatMulNBits": self._matmul_nbits,
            "DynamicQuantizeLinear": self._dynamic,
            "MatMulInteger": self._matmul_integer,
            "com.microsoft.MatMulIntegerToFloat": self._matmul_to_float,
            "com.microsoft.DynamicQuantizeMatMul": self._dynamic_matmul,
            **dict.fromkeys(QUANTIZE, self._quantize),
            **dict.fromkeys(DEQUANTIZE, self._dequantize),
        }

    def write(self, node: Node) -> Nodes | None:
        """What takes the node's place; None if it reads a tensor that is float here and knows no such."""
        if node.op in self._rules:
            return [*self._rules[node.op](node)]
        if self._float.intersection((*node.inputs, *node.captured)) and node.op != "Cast":
            if node.op not in MOVING or node.input(0) not in self._float:
                return None
            self._float.update(node.outputs)
        return [node.proto]

    def _matmul_nbits(self, node: Node) -> Iterator[onnx.NodeProto]:
        for attribute in node.proto.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = FLOAT_ACCURACY_LEVEL
        yield node.proto

    def _dynamic(self, node: Node) -> Iterator[onnx.NodeProto]:
        """The tensor itself, with a scale of 1 and a zero point of 0."""
        self._float.update((node.outputs[0], *node.outputs[2:]))
        yield helper.make_node("Identity", [node.input(0)], [node.outputs[0]])
        for name, value in zip(node.outputs[1:], (1.0, 0.0), strict=False):
            yield helper.make_node("Constant", [], [name], value_float=value)

    def _quantize(self, node: Node) -> Iterator[onnx.NodeProto]:
        if _is_weight(self._graph, node.input(0)) or not _is_one_number(self._graph, node.input(1)):
            yield node.proto
            return
        scaled = self._names.tensor("scaled")
        self._float.update((scaled, node.outputs[0]))
        yield helper.make_node("Div", [node.input(0), node.input(1)], [scaled])
        yield from self._sum("Add", scaled, node.input(2), node.outputs[0])

    def _dequantize(self, node: Node) -> Iterator[onnx.NodeProto]:
        if node.input(0) not in self._float:
            yield node.proto
            return
        shifted = self._names.tensor("shifted")
        yield from self._sum("Sub", node.input(0), node.input(2), shifted)
        yield helper.make_node("Mul", [shifted, node.input(1)], [node.outputs[0]])

    def _matmul_integer(self, node: Node) -> Iterator[onnx.NodeProto]:
        self._float.add(node.outputs[0])
        left, right = self._names.tensor("left"), self._names.tensor("right")
        yield from self._sum("Sub", node.input(0), node.input(2), left)
        yield from self._sum("Sub", node.input(1), node.input(3), right)
        yield helper.make_node("MatMul", [left, right], [node.outputs[0]])

    def _matmul_to_float(self, node: Node) -> Iterator[onnx.NodeProto]:
        left, right, scale = (self._names.tensor(stem) for stem in ("left", "right", "scale"))
        yield from self._sum("Sub", node.input(0), node.input(4), left)
        yield from self._sum("Sub", node.input(1), node.input(5), right)
        yield helper.make_node("Mul", [node.input(2), node.input(3)], [scale])
        yield from self._product(left, right, scale, node.input(6), node.outputs[0])

    def _dynamic_matmul(self, node: Node) -> Iterator[onnx.NodeProto]:
        right = self._names.tensor("right")
        yield from self._sum("Sub", node.input(1), node.input(3), right)
        yield from self._product(node.input(0), right, node.input(2), node.input(4), node.outputs[0])

    def _product(self, left: str, right: str, scale: str, bias: str, output: str) -> Iterator[onnx.NodeProto]:
        product, scaled = self._names.tensor("product"), self._names.tensor("scaled") if bias else output
        yield helper.make_node("MatMul", [left, right], [product])
        yield helper.make_node("Mul", [product, scale], [scaled])
        if bias:
            yield helper.make_node("Add", [scaled, bias], [output])

    def _sum(self, op: str, tensor: str, zero_point: str, output: str) -> Iterator[onnx.NodeProto]:
        """`tensor` and its zero point, if it has one, added or subtracted as floats."""
        operands = []
        for name in filter(None, (tensor, zero_point)):
            operands.append(name if name in self._float else self._names.tensor("as_float"))
            if operands[-1] != name:
                yield helper.make_node("Cast", [name], operands[-1:], to=onnx.TensorProto.FLOAT)
        yield helper.make_node(op if zero_point else "Identity", operands, [output])


def _is_weight(graph: Graph, tensor: str) -> bool:
    return tensor in graph.initializers or graph.constant(tensor) is not None


def _is_one_number(graph: Graph, tensor: str) -> bool:
    scale = graph.initializers.get(tensor)
    return scale is not None and elements(scale) == 1
