"""Whether the two branches of a merged decoder are one model: on an empty cache, the same but for where tokens stand.

Both are walked from their outputs on, side by side. Operators, attributes and weights must agree; what past and new
tokens are joined to in one is the new ones in the other. Only what no weight and no embedding goes into, masks and
positions, may be computed in another way, as it is where a past shifts it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..graph import BOOL, INTEGERS, Graph, Node
from ..naming import is_cache_name
from ..patterns import MissError

LISTS = "iub"  # kinds of numbers that weights are not made of


@dataclass(frozen=True)
class Branches:
    """The two branches, each as a model. joined: past and new -> new. crossed: past inputs -> what gives them."""

    with_past: Graph
    without: Graph
    joined: Mapping[str, str]
    crossed: Mapping[str, str]


def check_one_model(branches: Branches) -> None:
    """Raise MissError for the first nodes that differ."""
    handed = {*branches.crossed.values()}
    pending = [(name, name) for name in branches.with_past.outputs if name not in handed]
    seen = {*pending}
    while pending:
        for pair in _operands(branches, *pending.pop()):
            if pair not in seen:
                seen.add(pair)
                pending.append(pair)


def _operands(branches: Branches, past: str, alone: str) -> Iterable[tuple[str, str]]:
    """What two tensors are made of, side by side, if that has still to be compared. Raises MissError."""
    left, right = _View.of(branches.with_past, past, branches.joined), _View.of(branches.without, alone)
    if _is_past(branches, left, right):
        return ()
    makers = branches.with_past.producer(left.tensor), branches.without.producer(right.tensor)
    if left.order == right.order and _same_nodes(makers, left.tensor, right.tensor):
        return zip(*(node.inputs for node in makers if node), strict=True)
    same = left.order == right.order and _same_value(branches, left.tensor, right.tensor)
    if not same and not _may_differ(branches, left.tensor, right.tensor):
        raise MissError(
            f"{makers[0] or left.tensor} in the branch with a past and {makers[1] or right.tensor} in the other are "
            "not the same: the branches are not one model"
        )
    return ()


def _is_past(branches: Branches, left: _View, right: _View) -> bool:
    """Whether one branch reads as a past what the other one makes, or what an operator need not be given."""
    if left.tensor in branches.crossed:
        return _View.of(branches.without, branches.crossed[left.tensor]).turned(left.order) == right
    return not right.tensor and is_cache_name(left.tensor) and left.tensor in branches.with_past.inputs


@dataclass(frozen=True)
class _View:
    """A tensor whose axes are those of another, in this order; () as they are there."""

    tensor: str
    order: tuple[int, ...] = ()

    @classmethod
    def of(cls, graph: Graph, tensor: str, joined: Mapping[str, str] | None = None) -> _View:
        """What a tensor is a view of, seen through Identity, Transpose and what joins past and new."""
        view = cls(tensor)
        while True:
            node = graph.producer(view.tensor)
            if view.tensor in (joined or {}):
                view = _View((joined or {})[view.tensor], view.order)
            elif node is not None and node.op == "Identity":
                view = _View(node.inputs[0], view.order)
            elif node is not None and node.op == "Transpose" and _is_order(perm := node.attr("perm"), view.order):
                view = _View(node.inputs[0], tuple(perm)).turned(view.order)
            else:
                return view

    def turned(self, order: tuple[int, ...]) -> _View:
        """This view with its axes in another order."""
        if not (self.order and order):
            return _View(self.tensor, self.order or order)
        turned = tuple(self.order[axis] for axis in order)
        return _View(self.tensor, () if turned == tuple(sorted(turned)) else turned)


def _is_order(perm: Any, other: tuple[int, ...]) -> bool:
    """Whether a permutation is one, of as many axes as another if that has any."""
    return isinstance(perm, list) and sorted(perm) == [*range(len(perm))] and len(other) in (0, len(perm))


def _same_value(branches: Branches, past: str, alone: str) -> bool:
    """Whether two tensors are the same input or weight, or equal constants."""
    if branches.with_past.producer(past) is None and branches.without.producer(alone) is None and past == alone:
        return True
    left, right = branches.with_past.constant(past), branches.without.constant(alone)
    if left is None or right is None or left.dtype != right.dtype:
        return False
    return np.array_equal(left, right, equal_nan=left.dtype.kind == "f")


def _same_nodes(makers: tuple[Node | None, Node | None], past: str, alone: str) -> bool:
    """Whether two nodes do the same to their inputs, and these tensors are the same of their outputs."""
    left, right = makers
    if left is None or right is None or left.op == "Constant" or left.captured:
        return False
    facts = [
        (node.op, sorted(a.SerializeToString(deterministic=True) for a in node.proto.attribute), len(node.inputs))
        for node in (left, right)
    ]
    return facts[0] == facts[1] and left.outputs.index(past) == right.outputs.index(alone)


def _may_differ(branches: Branches, past: str, alone: str) -> bool:
    """Whether a past may shift what two tensors hold: they are computed, of no more than masks and positions are."""
    if _is_given(branches.with_past, past) and _is_given(branches.without, alone):
        return False
    return _stands_alone(branches.with_past, past) and _stands_alone(branches.without, alone)


def _is_given(graph: Graph, tensor: str) -> bool:
    maker = graph.producer(tensor)
    return maker is None or maker.op == "Constant"


def _stands_alone(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is made of sizes, masks, positions and numbers: of no weight, state or cache."""
    pending, seen = [tensor], {tensor}
    while pending:
        name = pending.pop()
        node = graph.producer(name)
        if node is None and not _is_list_or_number(graph, name):
            return False
        reads = {*node.inputs, *node.captured} - seen - {""} if node is not None and node.op != "Shape" else set()
        pending += reads
        seen |= reads
    return True


def _is_list_or_number(graph: Graph, tensor: str) -> bool:
    """Whether an input is of integers, or a constant of those or a single number."""
    value = graph.constant(tensor)
    if value is not None:
        return value.size <= 1 or value.dtype.kind in LISTS
    info = graph.inputs.get(tensor)
    return info is not None and info.type.tensor_type.elem_type in {*INTEGERS, BOOL}
