"""The caches of a model: float graph inputs whose data is joined with new tokens along one axis.

That happens in a Concat whose first part it is, or inside a node that takes past and gives present: the `Port`s that
families declare. On demand a cache is also an input that is named like one and never changes, as an encoder's keys and
values: of kind `cross`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from ..graph import Graph, Node, element_name
from ..naming import is_cache_name
from ..spec import CROSS, SELF

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

Order = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Port:
    """An operator that joins past and new itself: index of the past input, of the present output, the tokens' axis.

    axis: of the cache input, whatever Transpose lies between. new: index of the input that is just the new tokens, if
    one is. fixed: whether the past is a buffer that has its full size from the start; or the name of the attribute
    that says so. returned: whether only what an output of the model returns is a cache, as the operator has other uses.
    """

    past: int
    present: int
    axis: int
    new: int | None = None
    fixed: bool | str = False
    returned: bool = False

    def is_fixed(self, node: Node) -> bool:
        """Whether this node's past is a buffer of fixed size."""
        return node.flag(self.fixed) if isinstance(self.fixed, str) else self.fixed


Ports = Mapping[str, tuple[Port, ...]]


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """One cache tensor: `joined` holds past and new along `axis`; `new` is "" if the joining node has it inside.

    output: the graph output that returns it, "" if none does. nodes: indices of the nodes from `input` to `joined`
    and on to `output`. axis: of the tokens in `input`. order: the input's axes as they lie in `joined` and in `new`.
    fixed: it is a buffer, whose axis is not the past length. kind: `self`, or `cross`, whose `joined` and `new` are the
    input itself, and whose axis is a length of its own.
    """

    input: str
    output: str
    joined: str
    new: str
    axis: int
    order: Order
    element: str
    nodes: frozenset[int]
    fixed: bool = False
    kind: str = SELF

    @property
    def new_axis(self) -> int:
        """The axis of the tokens in `joined` and in `new`."""
        return self.order.index(self.axis)


@dataclass(frozen=True, slots=True)
class _Path:
    """A tensor that is a graph input passed on by nodes, its axes perhaps in another order."""

    input: str
    tensor: str
    order: Order
    nodes: tuple[int, ...] = ()

    def through(self, node: Node) -> _Path | None:
        """The path through a node that only passes on; None for other nodes."""
        order = self.order
        if node.op == "Transpose":
            perm = node.attr("perm", [*range(len(order))][::-1])
            if sorted(perm) != sorted(order):
                return None
            order = tuple(order[axis] for axis in perm)
        elif node.op not in PASSES_ON and not (node.op == "Concat" and len(node.inputs) == 1):
            return None
        return _Path(self.input, node.outputs[0], order, (*self.nodes, node.index))

    @property
    def is_straight(self) -> bool:
        """Whether the axes lie as in the input."""
        return self.order == tuple(sorted(self.order))


def find_caches(graph: Graph, ports: Ports, *, cross: bool = False) -> tuple[CacheTensor, ...]:
    """The caches of a graph, those of kind `cross` on demand."""
    found = tuple(cache for name in graph.inputs if (cache := _joined(graph, name, ports)) is not None)
    return (*found, *_constant_caches(graph, {cache.input for cache in found})) if cross else found


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


def unjoined(graph: Graph, caches: Collection[CacheTensor]) -> tuple[str, ...]:
    """Float inputs named like a cache that are none."""
    names = {cache.input for cache in caches}
    return tuple(
        name for name, info in graph.inputs.items() if name not in names and element_name(info) and is_cache_name(name)
    )


def _joined(graph: Graph, name: str, ports: Ports) -> CacheTensor | None:
    """The cache that an input is; None if no node joins it with new tokens."""
    info = graph.inputs[name]
    rank = len(info.type.tensor_type.shape.dim)
    if not element_name(info) or rank < 3:
        return None
    path = _Path(name, name, tuple(range(rank)))
    while (node := _only_reader(graph, path.tensor)) is not None:
        onward = path.through(node)
        if onward is None:
            return _by_concat(graph, path, node) if node.op == "Concat" else _by_port(graph, path, node, ports)
        path = onward
    return None


def _only_reader(graph: Graph, tensor: str) -> Node | None:
    """The one node that reads a tensor's data."""
    readers = [reader for reader in graph.consumers(tensor) if reader.op != "Shape"]
    return readers[0] if len(readers) == 1 else None


def _by_concat(graph: Graph, path: _Path, node: Node) -> CacheTensor | None:
    """The cache whose tokens a Concat puts first, before what is no other cache."""
    if len(node.inputs) != 2 or node.inputs[0] != path.tensor or node.inputs[1] == path.tensor:
        return None
    new, joined = node.inputs[1], node.outputs[0]
    if new in graph.inputs and is_cache_name(new):
        return None
    axis = path.order[node.attr("axis", 0) % len(path.order)]
    return _cache(graph, _Path(path.input, joined, path.order, (*path.nodes, node.index)), new, axis)


def _by_port(graph: Graph, path: _Path, node: Node, ports: Ports) -> CacheTensor | None:
    """The cache that a node joins by one of its operator's ports; those with the new tokens inside read it as it is."""
    for port in ports.get(node.op, ()):
        joined = node.outputs[port.present] if len(node.outputs) > port.present else ""
        new = "" if port.new is None else node.input(port.new)
        if node.input(port.past) == path.tensor and joined and (new or path.is_straight):
            end = _Path(path.input, joined, path.order, (*path.nodes, node.index) if new else path.nodes)
            cache = _cache(graph, end, new, port.axis, fixed=port.is_fixed(node))
            return cache if cache.output or not port.returned else None
    return None


def _cache(graph: Graph, joined: _Path, new: str, axis: int, *, fixed: bool = False, kind: str = SELF) -> CacheTensor:
    """The cache that is joined at the end of a path."""
    returned = _returned(graph, joined)
    return CacheTensor(
        input=joined.input,
        output="" if returned is None else returned.tensor,
        joined=joined.tensor,
        new=new,
        axis=axis,
        order=joined.order,
        element=element_name(graph.inputs[joined.input]),
        nodes=frozenset((joined if returned is None else returned).nodes),
        fixed=fixed,
        kind=kind,
    )


def _returned(graph: Graph, path: _Path) -> _Path | None:
    """The path on to a graph output, through nodes that only pass on; None if none leads there."""
    pending = [path]
    while pending:
        path = pending.pop()
        if path.tensor in graph.outputs and path.is_straight:
            return path
        onward = (path.through(node) for node in graph.consumers(path.tensor))
        pending += [further for further in onward if further is not None][::-1]
    return None


def _constant_caches(graph: Graph, joined: Collection[str]) -> Iterator[CacheTensor]:
    for name, info in graph.inputs.items():
        sizes = info.type.tensor_type.shape.dim
        unjoined = name not in joined and is_cache_name(name) and element_name(info)
        if unjoined and len(sizes) == 4 and not grows(graph, name):
            dynamic = [axis for axis, size in enumerate(sizes) if axis and not size.HasField("dim_value")]
            axis = dynamic[0] if len(dynamic) == 1 else TOKENS_AXIS
            yield _cache(graph, _Path(name, name, (0, 1, 2, 3)), name, axis, kind=CROSS)
