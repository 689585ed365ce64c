"""Rebuilds the shapes of tensors that vanished, from the past length and from sizes that stay (see `plan`)."""

from __future__ import annotations

from functools import reduce

from ..graph import Builder, Dim, Graph
from ..patterns import PAST_LENGTH
from .plan import Plan


def emit_shapes(builder: Builder, graph: Graph, plan: Plan, past_length: str) -> None:
    """A node in the place of each Shape of the plan, with its outputs."""
    sizes = _Sizes(builder, plan, past_length)
    for index, shape in sorted(plan.shapes.items()):
        parts = [sizes.tensor(size) for size in shape] or [builder.ints()]
        builder.nodes("Concat", *parts, outputs=graph.nodes[index].outputs, axis=0)


class _Sizes:
    """Tensors, shape (1), that hold sizes; each size has one."""

    def __init__(self, builder: Builder, plan: Plan, past_length: str) -> None:
        self._builder = builder
        self._plan = plan
        self._past_length = past_length
        self._known: dict[int | Dim, str] = {}

    def tensor(self, size: int | Dim) -> str:
        if size not in self._known:
            self._known[size] = self._builder.ints(size) if isinstance(size, int) else self._polynomial(size)
        return self._known[size]

    def _polynomial(self, size: Dim) -> str:
        if size.name is not None:
            return self._read(size.name)
        return self._chain("Add", [self._chain("Mul", [self.tensor(f) for f in term]) for term in size.factors()])

    def _chain(self, op: str, tensors: list[str]) -> str:
        return reduce(lambda total, tensor: self._builder.node(op, total, tensor), tensors)

    def _read(self, symbol: str) -> str:
        if symbol == PAST_LENGTH:
            return self._past_length
        source, builder = self._plan.sources[symbol], self._builder
        if source.is_size:
            whole = builder.node("Shape", source.tensor)
        else:
            whole = builder.node("Reshape", source.tensor, builder.ints(-1))
        return builder.node("Gather", whole, builder.ints(source.place))
