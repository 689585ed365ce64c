"""What must be put in the place of the shapes that vanishing tensors leave behind.

Every Shape of such a tensor that is still needed must follow from the past length and from tensors that stay and
exist before it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..graph import Dim, Node, Shape, Source
from ..patterns import PAST_LENGTH, DecoderGraph, Miss
from .site import Candidate
from .vanishing import operands, vanishing


@dataclass(frozen=True, slots=True)
class Plan:
    """What to put in the place of what vanishes.

    shapes: per Shape node that loses its input, the sizes it gave. sources: where each of their symbols is read. idle:
    results of attention that no output of the model needs, caches aside.
    """

    shapes: Mapping[int, Shape]
    sources: Mapping[str, Source]
    idle: frozenset[str] = frozenset()


class _LostError(Exception):
    """A shape can't be computed any more; its argument is a Miss."""


def make_plan(decoder: DecoderGraph, candidates: Sequence[Candidate]) -> Plan | Miss:
    """The shapes to rebuild for these candidates, or the one that can't be."""
    try:
        return _Planner(decoder, candidates).plan()
    except _LostError as error:
        miss: Miss = error.args[0]
        return miss


class _Planner:
    """Walks back from the outputs of the model that stay."""

    def __init__(self, decoder: DecoderGraph, candidates: Sequence[Candidate]) -> None:
        self._decoder = decoder
        self._gone = {name for each in candidates for name in vanishing(decoder, each)}
        self._makers = {each.output.tensor: each for each in candidates}
        self._dropped = {name for each in candidates for name in each.cache_outputs}
        self._shapes: dict[int, Shape] = {}
        self._sources: dict[str, Source] = {}

    def plan(self) -> Plan:
        pending = [name for name in self._decoder.graph.outputs if name not in self._dropped]
        seen = set(pending)
        while pending:
            needs = self._needs(pending.pop())
            pending += [name for name in needs if name not in seen]
            seen.update(needs)
        return Plan(self._shapes, self._sources, frozenset(self._makers.keys() - seen))

    def _needs(self, tensor: str) -> Collection[str]:
        node = self._decoder.graph.producer(tensor)
        if tensor in self._makers:
            return operands(self._makers[tensor])
        if node is None:
            return ()
        if node.op == "Shape" and node.inputs[0] in self._gone:
            return self._rebuilt(node)
        return (*node.inputs, *node.captured)

    def _rebuilt(self, node: Node) -> list[str]:
        """Tensors from which the result of a Shape is rebuilt."""
        full = self._decoder.shapes.shape(node.inputs[0])
        if full is None:
            raise _LostError(
                Miss(node.name, f"the shape of {node.inputs[0]!r}, which vanishes with the cache, is not known")
            )
        sizes = full[slice(node.attr("start", 0), node.attr("end"))]
        names = sorted({name for size in sizes if isinstance(size, Dim) for name in size.symbols} - {PAST_LENGTH})
        sources = {name: self._source(node, name) for name in names}
        self._shapes[node.index] = sizes
        self._sources |= sources
        return [source.tensor for source in sources.values()]

    def _source(self, node: Node, symbol: str) -> Source:
        """Where a symbol can be read before a node runs."""
        places = self._decoder.shapes.sources.get(symbol, ())
        place = next((place for place in places if place.tensor not in self._gone), None)
        maker = None if place is None else self._decoder.graph.producer(place.tensor)
        if place is None or (maker is not None and maker.index >= node.index):
            raise _LostError(
                Miss(
                    node.name,
                    f"size {symbol!r} of {node.inputs[0]!r} is known from the cache only; give the axis of another "
                    "input that has this size the same name",
                )
            )
        return place
