"""Products of a tensor with a cache, whatever operator spells them, as sums over labelled axes."""

from __future__ import annotations

from dataclasses import dataclass

from ...graph import Labels, Node, read_equation
from ..decoder_graph import DecoderGraph
from ..match import MissError
from .cache_view import path_from_cache

MATMULS = ("MatMul", "com.microsoft.FusedMatMul")
PRODUCTS = (*MATMULS, "Einsum")


@dataclass(frozen=True, slots=True)
class Contraction:
    """`factor` times the sum of left * right over `summed`; labels say which axes of both and of the result are one.

    right: the operand that shows a cache. free: the one label that only it has. An axis of size 1 is broadcast.
    """

    node: Node
    left: str
    right: str
    left_labels: Labels
    right_labels: Labels
    labels: Labels
    summed: str
    free: str
    factor: float


def is_cache_product(decoder: DecoderGraph, node: Node) -> bool:
    """Whether a node multiplies a tensor with a cache."""
    return _cache_side(decoder, node) is not None


def read_contraction(decoder: DecoderGraph, node: Node) -> Contraction | None:
    """What a node sums; None if it is no product with a cache, MissError if it is another than of attention."""
    right = _cache_side(decoder, node)
    if right is None:
        return None
    if len(node.inputs) != 2:
        raise MissError(f"{node}: a product of {len(node.inputs)} tensors; expected 2, multiply the others before")
    ranks = [decoder.shapes.rank(name) for name in node.inputs]
    if node.op == "Einsum":
        equation = read_equation(node.attr("equation", ""), ranks)
        if equation is None:
            raise MissError(f"{node}: equation {node.attr('equation')!r} does not say what becomes of each axis")
        operands, labels = equation
    else:
        operands, labels = _matmul(node, ranks)
    left_labels, right_labels = operands[1 - right], operands[right]
    summed = [label for label in left_labels if label in right_labels and label not in labels]
    free = [label for label in right_labels if label not in left_labels]
    kept = {*left_labels, *right_labels} - {*labels} == {*summed}
    once = all(len({*each}) == len(each) for each in (left_labels, right_labels, labels))
    if not (len(summed) == len(free) == 1 and kept and once):
        raise MissError(f"{node}: expected a sum over one axis that both operands have, which keeps all others")
    tensors = node.inputs[1 - right], node.inputs[right]
    return Contraction(node, *tensors, left_labels, right_labels, labels, summed[0], free[0], node.attr("alpha", 1.0))


def _cache_side(decoder: DecoderGraph, node: Node) -> int | None:
    """Which input shows a cache: of a MatMul only the second may, since its first one's rows are the result's."""
    if node.op not in PRODUCTS:
        return None
    sides = (1,) if node.op in MATMULS else range(len(node.inputs))[::-1]
    return next((i for i in sides if path_from_cache(decoder, node.inputs[i]) is not None), None)


def _matmul(node: Node, ranks: list[int | None]) -> tuple[tuple[Labels, Labels], Labels]:
    if node.attr("transBatchA", 0) or node.attr("transBatchB", 0):
        raise MissError(f"{node}: batch axes transposed on the fly; expected a Transpose of its own")
    left, right = ranks
    if right is None or right < 3 or left != right:
        got = "a number that its shapes do not tell" if left is None else left
        raise MissError(f"{node}: expected a query of {right} axes, as the keys have, got {got}")
    batch = tuple(map(str, range(right - 2)))
    a, b = ("m", "k"), ("k", "n")
    sides = (*batch, *(a[::-1] if node.attr("transA", 0) else a)), (*batch, *(b[::-1] if node.attr("transB", 0) else b))
    return sides, (*batch, "m", "n")
