"""From a Softmax on to the value MatMul: NaN guards, the dropped column of the sinks; and reshapes on the whole way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..graph import Dim, Node
from .decoder import Decoder, is_float_cast
from .scores import MATMULS
from .site import MissError


@dataclass(frozen=True, slots=True)
class Product:
    """The value MatMul and what happens between the softmax and it."""

    matmul: Node
    nan_to_zero: bool
    nodes: tuple[Node, ...]


def product_after(decoder: Decoder, weights: str, sink: str) -> Product | None:
    """Walk on from the softmax to the MatMul with the values; None if it leads nowhere, MissError if it forks."""
    graph, tensor, nodes, nan_to_zero, dropped = decoder.graph, weights, [], False, not sink
    while True:
        readers = list(graph.consumers(tensor))
        guard = _nan_guard(decoder, tensor, readers)
        if guard is not None:
            nodes += guard
            nan_to_zero, tensor = True, guard[-1].outputs[0]
            continue
        readers = [n for n in readers if n.op != "Shape"]
        if not readers or tensor in graph.outputs:
            return None
        if len(readers) > 1:
            raise MissError(f"attention weights {tensor!r} are read by {readers[0]} and by {readers[1]}")
        (node,) = readers
        nodes.append(node)
        if node.op in MATMULS:
            if node.inputs[0] != tensor or node.attr("transA", 0) or node.attr("alpha", 1.0) != 1.0:
                return None
            if not dropped:
                raise MissError(f"{node}: the column of the sink logits is not dropped before the values")
            return Product(node, nan_to_zero, tuple(nodes))
        if node.op in ("Identity", "Dropout", "Reshape") or is_float_cast(decoder.shapes, node):
            tensor = node.outputs[0]
        elif node.op == "Slice" and not dropped and _drops_last(decoder, node):
            dropped, tensor = True, node.outputs[0]
        else:
            return None


def _nan_guard(decoder: Decoder, tensor: str, readers: list[Node]) -> list[Node] | None:
    """The nodes (Cast,) IsNaN and Where of where(isnan(x), 0, x), if that is all that reads x."""
    wheres = [n for n in readers if n.op == "Where"]
    others = [n for n in readers if n.op != "Where"]
    if len(wheres) != 1 or len(others) != 1:
        return None
    where, nodes = wheres[0], others
    if is_float_cast(decoder.shapes, nodes[0]):
        nodes = [*nodes, *decoder.graph.consumers(nodes[0].outputs[0])]
    check = nodes[-1]
    if len(nodes) > 2 or check.op != "IsNaN" or where.inputs[0] != check.outputs[0] or where.inputs[2] != tensor:
        return None
    if decoder.shapes.scalar(where.inputs[1]) != 0.0:
        raise MissError(f"{where}: expected NaN to become 0")
    return [*nodes, where]


def _drops_last(decoder: Decoder, node: Node) -> bool:
    def values(i: int) -> list[object] | None:
        value = decoder.shapes.value(node.input(i)) if node.input(i) else None
        return None if value is None else list(value.flat)

    return values(1) == [0] and values(2) == [-1] and values(3) in ([3], [-1]) and values(4) in (None, [1])


def check_reshapes(decoder: Decoder, nodes: Iterable[Node], scores: Node, heads: int) -> None:
    """Raise MissError unless every Reshape goes between (B, heads, S, T) and ((B heads), S, T), as `scores` has T."""
    total = decoder.shapes.shape(scores.outputs[0])
    for node in nodes:
        if node.op == "Reshape" and not (total and _merges_heads(decoder, node, total[-1], heads)):
            raise MissError(
                f"{node}: it is not proven to go between (batch, {heads} heads, tokens, tokens) and the same with "
                "batch and heads merged"
            )


def _merges_heads(decoder: Decoder, node: Node, total: int | Dim, heads: int) -> bool:
    before, after = (decoder.shapes.shape(name) for name in (node.inputs[0], node.outputs[0]))
    if before is None or after is None or {len(before), len(after)} != {3, 4}:
        return False
    four, three = (before, after) if len(before) == 4 else (after, before)
    target = decoder.shapes.value(node.input(1))
    keeps_last = target is not None and target.flat[-1] == total
    return (four[1], four[2]) == (heads, three[1]) and (keeps_last or four[0] * heads == three[0])
