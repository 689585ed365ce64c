"""From a Softmax on to the product with the values: NaN guards, the dropped column of the sinks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...graph import Node
from ..decoder_graph import DecoderGraph
from ..match import MissError
from .contraction import PRODUCTS, Contraction, read_contraction

PASSES_WEIGHTS = ("Identity", "Dropout", "Reshape")


@dataclass(frozen=True, slots=True)
class Mixing:
    """The product of weights and values, and what happens between the softmax and it."""

    product: Contraction
    nan_to_zero: bool
    nodes: tuple[Node, ...]


def weights_after(decoder: DecoderGraph, weights: str, sink: str) -> Mixing | None:
    """Walk on from the softmax to the product with the values; None if it leads nowhere, MissError if it forks."""
    tensor, nodes, nan_to_zero, dropped = weights, list[Node](), False, not sink
    while (readers := decoder.graph.consumers(tensor)) and tensor not in decoder.graph.outputs:
        guard = _nan_guard(decoder, tensor, list(readers))
        if guard is not None:
            nodes, nan_to_zero, tensor = [*nodes, *guard], True, guard[-1].outputs[0]
            continue
        node = _only_reader(tensor, readers)
        if node is None:
            return None
        nodes.append(node)
        if node.op in PRODUCTS:
            product = _product(decoder, node, tensor)
            if product is not None and not dropped:
                raise MissError(f"{node}: the column of the sink logits is not dropped before the values")
            return None if product is None else Mixing(product, nan_to_zero, tuple(nodes))
        drops = not dropped and node.op == "Slice" and _drops_last(decoder, node)
        if not drops and node.op not in PASSES_WEIGHTS and not decoder.is_float_cast(node):
            return None
        dropped, tensor = dropped or drops, node.outputs[0]
    return None


def _only_reader(tensor: str, readers: Sequence[Node]) -> Node | None:
    """The node that reads the weights' data. Raises MissError if several do."""
    readers = [node for node in readers if node.op != "Shape"]
    if len(readers) > 1:
        raise MissError(f"attention weights {tensor!r} are read by {readers[0]} and by {readers[1]}")
    return readers[0] if readers else None


def _product(decoder: DecoderGraph, node: Node, weights: str) -> Contraction | None:
    """Weights times values as a node sums them; None for another product. Raises MissError if it reads no cache."""
    product = read_contraction(decoder, node)
    if product is None:
        others = [name for name in node.inputs if name != weights]
        raise MissError(f"{node}: expected the values of a cache, got {', '.join(map(repr, others))}")
    return product if product.left == weights and product.factor == 1.0 else None


def _nan_guard(decoder: DecoderGraph, tensor: str, readers: list[Node]) -> list[Node] | None:
    """The nodes (Cast,) IsNaN and Where of where(isnan(x), 0, x), if that is all that reads x."""
    wheres = [n for n in readers if n.op == "Where"]
    others = [n for n in readers if n.op != "Where"]
    if len(wheres) != 1 or len(others) != 1:
        return None
    where, nodes = wheres[0], others
    if decoder.is_float_cast(nodes[0]):
        nodes = [*nodes, *decoder.graph.consumers(nodes[0].outputs[0])]
    check = nodes[-1]
    if len(nodes) > 2 or check.op != "IsNaN" or where.inputs[0] != check.outputs[0] or where.inputs[2] != tensor:
        return None
    if decoder.shapes.scalar(where.inputs[1]) != 0.0:
        raise MissError(f"{where}: expected NaN to become 0")
    return [*nodes, where]


def _drops_last(decoder: DecoderGraph, node: Node) -> bool:
    def values(i: int) -> list[object] | None:
        value = decoder.shapes.value(node.input(i)) if node.input(i) else None
        return None if value is None else list(value.flat)

    rank = decoder.shapes.rank(node.inputs[0])
    last = [[-1]] if rank is None else [[-1], [rank - 1]]
    return values(1) == [0] and values(2) == [-1] and values(3) in last and values(4) in (None, [1])
