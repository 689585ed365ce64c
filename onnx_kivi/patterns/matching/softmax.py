"""A softmax over the last axis: the operator, or written out as exp(x - max(x)) / sum(exp(x - max(x))).

onnxruntime's optimizer writes it out for float16 on a CPU, where the operator has no kernel (ONNX specification,
Softmax-13: the function's body).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...graph import Dim, Node
from ..decoder_graph import DecoderGraph
from ..match import MissError

EXPLICIT_SOFTMAX_AXIS = 13


@dataclass(frozen=True, slots=True)
class Softmax:
    """Where the logits come in and the weights come out, and the nodes between; max(x) is left to the walk back."""

    input: str
    output: str
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """Name of the last node."""
        return self.nodes[-1].name


def read_softmax(decoder: DecoderGraph, node: Node) -> Softmax | None:
    """The softmax that ends in this node, over whatever axis; None if none does."""
    if node.op == "Softmax":
        return Softmax(node.inputs[0], node.outputs[0], (node,))
    exp, total = (decoder.graph.producer(name) for name in node.inputs)
    if exp is None or exp.op != "Exp" or total is None or total.op != "ReduceSum" or total.inputs[0] != exp.outputs[0]:
        return None
    shifted = decoder.graph.producer(exp.inputs[0])
    if shifted is None or shifted.op != "Sub" or not is_over_last_axis(decoder, total):
        return None
    return Softmax(exp.inputs[0], node.outputs[0], (exp, total, node))


def check_axis(decoder: DecoderGraph, softmax: Softmax) -> None:
    """Raise MissError unless it runs over the last axis."""
    node = softmax.nodes[-1]
    rank = decoder.shapes.rank(softmax.input)
    axis = node.attr("axis", -1 if decoder.graph.opset >= EXPLICIT_SOFTMAX_AXIS else 1)
    if node.op == "Softmax" and axis != -1 and (rank is None or axis != rank - 1):
        raise MissError(f"softmax over axis {axis}: expected the last axis, which holds the tokens")


def is_over_last_axis(decoder: DecoderGraph, reduction: Node) -> bool:
    """Whether a reduction goes over the last axis alone and keeps it."""
    rank, axes = decoder.shapes.rank(reduction.inputs[0]), reduced_axes(decoder, reduction)
    return reduction.flag("keepdims", 1) and (axes == [-1] or (rank is not None and axes == [rank - 1]))


def reduced_axes(decoder: DecoderGraph, node: Node) -> list[int] | None:
    """Axes of a reduction, from its attribute or input."""
    if node.input(1):
        value = decoder.shapes.value(node.input(1))
        return None if value is None or any(isinstance(x, Dim) for x in value.flat) else [int(x) for x in value.flat]
    axes = node.attr("axes")
    return None if axes is None else list(axes)
