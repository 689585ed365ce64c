"""What a family sees of a model: the graph, its shapes, and the caches found in it.

A cache is a float graph input whose data is joined with new tokens along one axis: by a Concat whose first part it
is, or inside a node that takes past and gives present (the `Port`s that families declare). On demand it is also one
that is named like a cache and never changes, as an encoder's keys and values: of kind `cross`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..graph import FLOATS, Graph, Node, Shape, Shapes, element_name, infer_shapes, symbol
from ..naming import is_cache_name
from ..spec import CROSS, SELF

PAST_LENGTH = "onnx_kivi.past_length"
PASSES_ON = ("Identity", "Cast")
ENDS_A_CACHE = (
    "MatMul",
    "Gemm",
    "Softmax",
    "Attention",
    "com.microsoft.FusedMatMul",
    "com.microsoft.MultiHeadAttention",
    "Shape",
)
TOKENS_AXIS = 2


@dataclass(frozen=True, slots=True)
class Port:
    """An operator that joins past and new itself: index of the past input, of the present output, the tokens' axis.

    new: index of the input that is just the new tokens, if one is. fixed: whether the past is a buffer that has its
    full size from the start; or the name of the attribute that says so.
    """

    past: int
    present: int
    axis: int
    new: int | None = None
    fixed: bool | str = False

    def is_fixed(self, node: Node) -> bool:
        """Whether this node's past is a buffer of fixed size."""
        return bool(node.attr(self.fixed, 0)) if isinstance(self.fixed, str) else self.fixed


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One cache tensor: `joined` holds past and new along `axis`; `new` is "" if the joining node has it inside.

    output: the graph output that returns it, "" if none does. nodes: indices of the nodes from `input` to `joined`
    and on to `output`. rank: of the input. fixed: it is a buffer, whose axis is not the past length. kind: `self`, or
    `cross`, whose `joined` and `new` are the input itself, and whose axis is a length of its own.
    """

    input: str
    output: str
    joined: str
    new: str
    axis: int
    rank: int
    nodes: frozenset[int]
    fixed: bool = False
    kind: str = SELF


@dataclass(frozen=True)
class DecoderGraph:
    """A model as families see it. `caches` is keyed by the joined tensor."""

    graph: Graph
    shapes: Shapes
    caches: Mapping[str, CacheTensor]

    def element(self, tensor: str, otherwise: str) -> str:
        """Name of a tensor's floating type, if it is known."""
        return FLOATS.get(self.shapes.element(tensor), otherwise)

    @cached_property
    def unjoined(self) -> tuple[str, ...]:
        """Float inputs named like a cache that no node joins with new tokens."""
        joined = {cache.input for cache in self.caches.values()}
        return tuple(
            name
            for name, info in self.graph.inputs.items()
            if name not in joined and element_name(info) and is_cache_name(name)
        )

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


def read_decoder(
    graph: Graph, ports: Mapping[str, tuple[Port, ...]], other: Collection[str] = (), *, cross: bool = False
) -> DecoderGraph:
    """Find the caches of a graph, those of kind `cross` on demand, and infer its shapes.

    All caches of kind `self` have one past length, but for the `other` ones.
    """
    caches = tuple(_caches(graph, ports))
    if cross:
        caches += tuple(_constant_caches(graph, {cache.input for cache in caches}))
    past: dict[str, Shape] = {}
    for cache in caches:
        sizes = graph.inputs[cache.input].type.tensor_type.shape.dim
        past[cache.input] = tuple(
            symbol(PAST_LENGTH)
            if i == cache.axis and not cache.fixed and cache.kind == SELF and cache.input not in other
            else d.dim_value
            if d.HasField("dim_value")
            else symbol(d.dim_param or f"{cache.input}[{i}]")
            for i, d in enumerate(sizes)
        )
    return DecoderGraph(graph, infer_shapes(graph, past), {cache.joined: cache for cache in caches})


def _caches(graph: Graph, ports: Mapping[str, tuple[Port, ...]]) -> Iterator[CacheTensor]:
    for name, info in graph.inputs.items():
        rank = len(info.type.tensor_type.shape.dim)
        if not element_name(info) or rank < 3:
            continue
        joined = _join(graph, name, rank, ports)
        if joined is not None:
            yield joined


def _join(graph: Graph, name: str, rank: int, ports: Mapping[str, tuple[Port, ...]]) -> CacheTensor | None:
    tensor, nodes = name, []
    while True:
        readers = [n for n in graph.consumers(tensor) if n.op != "Shape"]
        if len(readers) != 1:
            return None
        (node,) = readers
        nodes.append(node.index)
        if node.op in PASSES_ON or (node.op == "Concat" and len(node.inputs) == 1):
            tensor = node.outputs[0]
            continue
        if node.op == "Concat" and len(node.inputs) == 2 and node.inputs[0] == tensor != node.inputs[1]:
            if is_cache_input(graph, node.inputs[1]):
                return None
            axis = node.attr("axis", 0) % rank
            output, more = _returned(graph, node.outputs[0])
            return CacheTensor(name, output, node.outputs[0], node.inputs[1], axis, rank, frozenset((*nodes, *more)))
        for port in ports.get(node.op, ()):
            joined = node.outputs[port.present] if len(node.outputs) > port.present else ""
            if node.input(port.past) == tensor and joined:
                new = "" if port.new is None else node.input(port.new)
                output, more = _returned(graph, joined)
                path = frozenset((*(nodes if new else nodes[:-1]), *more))
                return CacheTensor(name, output, joined, new, port.axis, rank, path, port.is_fixed(node))
        return None


def _constant_caches(graph: Graph, joined: Collection[str]) -> Iterator[CacheTensor]:
    for name, info in graph.inputs.items():
        sizes = info.type.tensor_type.shape.dim
        unjoined = name not in joined and is_cache_name(name) and element_name(info)
        if unjoined and len(sizes) == 4 and not grows(graph, name):
            dynamic = [axis for axis, size in enumerate(sizes) if axis and not size.HasField("dim_value")]
            axis = dynamic[0] if len(dynamic) == 1 else TOKENS_AXIS
            output, nodes = _returned(graph, name)
            yield CacheTensor(name, output, name, name, axis, len(sizes), frozenset(nodes), kind=CROSS)


def grows(graph: Graph, name: str) -> bool:
    """Whether what a cache input becomes leaves the model again, as a growing cache does and an encoder's does not."""
    pending, seen = [(name, False)], {name}
    while pending:
        tensor, changed = pending.pop()
        if tensor in graph.outputs and changed:
            return True
        for node in graph.consumers(tensor):
            if node.op not in ENDS_A_CACHE:
                pending += [(out, changed or node.op not in PASSES_ON) for out in node.outputs if out not in seen]
                seen.update(node.outputs)
    return False


def _returned(graph: Graph, joined: str) -> tuple[str, list[int]]:
    """The graph output that is `joined`, and the nodes between that only pass it on."""
    if joined in graph.outputs:
        return joined, []
    for node in graph.consumers(joined):
        if node.op in PASSES_ON:
            output, nodes = _returned(graph, node.outputs[0])
            if output:
                return output, [node.index, *nodes]
    return "", []


def is_cache_input(graph: Graph, tensor: str) -> bool:
    """Whether a tensor is a graph input that is named like a cache."""
    return tensor in graph.inputs and is_cache_name(tensor)


def is_float_cast(shapes: Shapes, node: Node) -> bool:
    """Whether a Cast goes from one floating type to another."""
    return node.op == "Cast" and shapes.element(node.inputs[0]) in FLOATS and node.attr("to") in FLOATS
