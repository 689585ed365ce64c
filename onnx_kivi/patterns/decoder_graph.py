"""What a family sees of a model: the graph, its shapes, and the caches found in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..graph import FLOATS, Dim, Graph, Node, Shape, Shapes, infer_shapes, symbol
from ..spec import SELF
from .caches import CacheTensor

PAST_LENGTH = "onnx_kivi.past_length"
ROW_PAST_LENGTH = "onnx_kivi.row_past_length"


@dataclass(frozen=True)
class DecoderGraph:
    """A model as families see it. `caches` is keyed by the joined tensor."""

    graph: Graph
    shapes: Shapes
    caches: Mapping[str, CacheTensor]

    def element(self, tensor: str, otherwise: str) -> str:
        """Name of a tensor's floating type, if it is known."""
        return FLOATS.get(self.shapes.element(tensor), otherwise)

    def last_size(self, tensor: str) -> int | None:
        """Size of a tensor's last axis, if it is a known number."""
        size = (self.shapes.shape(tensor) or (None,))[-1]
        return size if isinstance(size, int) else None

    def on_input(self, tensor: str, axis: int) -> tuple[str, int] | None:
        """An axis of a graph input that is no cache, and as long as this one; None if none is known."""
        shape = self.shapes.shape(tensor)
        size = None if shape is None or axis >= len(shape) else shape[axis]
        caches = {cache.input for cache in self.caches.values()}
        places = self.shapes.sources.get(size.name or "", ()) if isinstance(size, Dim) else ()
        shown = (p for p in places if p.is_size and p.tensor in self.graph.inputs and p.tensor not in caches)
        return next(((place.tensor, place.place) for place in shown), None)

    def is_float_cast(self, node: Node) -> bool:
        """Whether a node is a Cast from one floating type to another."""
        return node.op == "Cast" and self.shapes.element(node.inputs[0]) in FLOATS and node.attr("to") in FLOATS

    @cached_property
    def shape_only(self) -> frozenset[int]:
        """Indices of the nodes whose results are read by nothing but Shape, and by nodes of this kind."""
        found: set[int] = set()
        outputs = set(self.graph.outputs)
        for node in reversed(self.graph.nodes):
            readers = [reader for name in node.outputs for reader in self.graph.consumers(name)]
            idle = all(reader.op == "Shape" or reader.index in found for reader in readers)
            if readers and idle and not outputs.intersection(node.outputs):
                found.add(node.index)
        return frozenset(found)


def read_decoder(graph: Graph, caches: Collection[CacheTensor], apart: Collection[str] = ()) -> DecoderGraph:
    """The graph with its shapes. Caches of kind `self` have one past length, but for the inputs `apart`."""
    past = {cache.input: _past_shape(graph, cache, cache.input not in apart) for cache in caches}
    return DecoderGraph(graph, infer_shapes(graph, past), {cache.joined: cache for cache in caches})


def _past_shape(graph: Graph, cache: CacheTensor, shares_length: bool) -> Shape:
    """Declared sizes, names for those that are open, and the past length where the cache's tokens are."""
    sizes = graph.inputs[cache.input].type.tensor_type.shape.dim
    grows = shares_length and not cache.fixed and cache.kind == SELF
    return tuple(
        symbol(PAST_LENGTH)
        if axis == cache.axis and grows
        else size.dim_value
        if size.HasField("dim_value")
        else symbol(size.dim_param or f"{cache.input}[{axis}]")
        for axis, size in enumerate(sizes)
    )
