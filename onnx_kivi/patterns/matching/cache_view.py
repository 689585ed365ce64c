"""How a cache's axes lie in a tensor made of it by layout operators: the proof behind repeat_kv and transposes.

Each axis of the tensor is a tuple of atoms, slowest first. An atom is an axis of the cache (0 to 3) or a repetition
that Expand or Tile added. Only moves that are proven, from symbolic shapes, to permute, merge, split or repeat whole
atoms are followed; anything else raises MissError.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...graph import Dim, Node, Shape
from ..caches import CacheTensor
from ..decoder_graph import DecoderGraph
from ..match import MissError

MOVES = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Tile", "Identity", "Cast", "Mul", "Div")
REPEAT = -1


@dataclass(frozen=True, slots=True)
class Atom:
    """A whole axis of the cache, a repetition (axis == REPEAT), or in scores the axis of a layout letter."""

    axis: int | str
    size: int | Dim


Axes = tuple[tuple[Atom, ...], ...]


@dataclass(frozen=True, slots=True)
class CacheView:
    """A tensor that holds a cache: its axes, the factor it was multiplied by, and the nodes that made it of it."""

    cache: CacheTensor
    axes: Axes
    scale: float
    nodes: tuple[Node, ...]

    @property
    def indices(self) -> frozenset[int]:
        """Indices of the nodes."""
        return frozenset(node.index for node in self.nodes)

    def names(self) -> tuple[tuple[int | str, ...], ...]:
        """Atoms of each axis by cache axis, sizes of 1 left out."""
        return tuple(tuple(a.axis for a in axis if a.size != 1) for axis in self.axes)


def cache_view(decoder: DecoderGraph, tensor: str) -> CacheView | None:
    """What `tensor` shows of a cache; None if it is not made of one by layout operators. Raises MissError."""
    path = path_from_cache(decoder, tensor)
    if path is None:
        return None
    cache = decoder.caches[path[0][1] if path else tensor]
    axes, scale = _joined_axes(decoder, cache), 1.0
    for node, source in path:
        if node.op in ("Mul", "Div"):
            scale *= factor(decoder, node, source)
        else:
            axes = _move(decoder, node, axes)
    return CacheView(cache, axes, scale, tuple(node for node, _ in path[::-1]))


def check_grows(view: CacheView) -> None:
    """Raise MissError for a buffer of fixed size."""
    if view.cache.fixed:
        raise MissError(
            f"cache {view.cache.input!r} is a buffer of fixed size; expected attention that is told how much it holds"
        )


def path_from_cache(decoder: DecoderGraph, tensor: str) -> list[tuple[Node, str]] | None:
    """The layout operators from a cache to a tensor, each with the input that carries it; None if no cache is there."""
    path: list[tuple[Node, str]] = []
    while tensor not in decoder.caches:
        node = decoder.graph.producer(tensor)
        source = None if node is None else data_input(decoder, node)
        if node is None or source is None:
            return None
        path.append((node, source))
        tensor = source
    return path[::-1]


def _joined_axes(decoder: DecoderGraph, cache: CacheTensor) -> Axes:
    """The axes of a cache joined with new tokens."""
    declared = decoder.graph.inputs[cache.input].type.tensor_type.shape.dim[cache.axis]
    if declared.HasField("dim_value") and not cache.fixed:
        raise MissError(
            f"cache {cache.input!r} is declared to hold exactly {declared.dim_value} tokens; export it with a "
            "dynamic axis"
        )
    past = decoder.shapes.shape(cache.input)
    shape = decoder.shapes.shape(cache.joined) or (past and tuple(past[axis] for axis in cache.order))
    if shape is None or len(shape) != 4:
        raise MissError(f"cache {cache.input!r}: expected 4 axes, got {'unknown' if shape is None else len(shape)}")
    return tuple((Atom(axis, size),) for axis, size in zip(cache.order, shape, strict=True))


def factor(decoder: DecoderGraph, node: Node, source: str) -> float:
    """The number by which a Mul or Div multiplies its input `source`."""
    other = decoder.shapes.scalar(_other(node, source))
    if other is None or (node.op == "Div" and other == 0):
        raise MissError(f"{node}: expected a constant factor, got tensor {_other(node, source)!r}")
    return other if node.op == "Mul" else 1 / other


def scaled_input(decoder: DecoderGraph, node: Node) -> str | None:
    """The input of a Mul or Div that is multiplied by a known one-element number; None if there is no such."""
    a, b = node.inputs
    if decoder.shapes.scalar(b) is not None:
        return a
    return b if node.op == "Mul" and decoder.shapes.scalar(a) is not None else None


def _other(node: Node, source: str) -> str:
    return node.inputs[1] if node.inputs[0] == source else node.inputs[0]


def data_input(decoder: DecoderGraph, node: Node) -> str | None:
    """The input whose data a layout operator or scaling carries on; None for other nodes."""
    if node.op not in MOVES:
        return None
    if node.op in ("Mul", "Div"):
        return scaled_input(decoder, node)
    if node.op == "Cast" and not decoder.is_float_cast(node):
        return None
    return node.inputs[0]


def _move(decoder: DecoderGraph, node: Node, axes: Axes) -> Axes:
    if node.op in ("Identity", "Cast"):
        return axes
    if node.op == "Transpose":
        perm = node.attr("perm", list(range(len(axes)))[::-1])
        if sorted(perm) != list(range(len(axes))):
            raise MissError(f"{node}: expected a permutation of {len(axes)} axes, got {perm}")
        return tuple(axes[i] for i in perm)
    shape = decoder.shapes.shape(node.outputs[0])
    if shape is None:
        raise MissError(f"{node}: the shape it makes is not known")
    if node.op == "Expand":
        return _expand(node, axes, shape)
    if node.op == "Tile":
        return _tile(decoder, node, axes)
    return regroup(node, axes, shape)


def _expand(node: Node, axes: Axes, shape: Shape) -> Axes:
    padded: list[tuple[Atom, ...]] = [()] * (len(shape) - len(axes)) + list(axes)
    out: list[tuple[Atom, ...]] = []
    for axis, size in zip(padded, shape, strict=True):
        now = math.prod(a.size for a in axis)
        if now == size:
            out.append(axis)
        elif now == 1:
            out.append((*axis, Atom(REPEAT, size)))
        else:
            raise MissError(f"{node}: size {now} becomes {size}, which is not proven to be a repetition")
    return tuple(out)


def _tile(decoder: DecoderGraph, node: Node, axes: Axes) -> Axes:
    repeats = decoder.shapes.value(node.inputs[1])
    if repeats is None:
        raise MissError(f"{node}: how often it repeats each axis is not known")
    pairs = zip(axes, repeats.flat, strict=True)
    return tuple(axis if count == 1 else (Atom(REPEAT, count), *axis) for axis, count in pairs)


def regroup(node: Node, axes: Sequence[tuple[Atom, ...]], shape: Shape) -> Axes:
    """The atoms of `axes`, in order, grouped into axes of the sizes in `shape`. Raises MissError if they don't fit.

    One axis whose size can't be composed takes what those before and after it leave, as the count of elements says.
    """
    atoms = [atom for axis in axes for atom in axis]
    before = _groups(atoms, shape)
    rest = atoms[sum(map(len, before)) :]
    if len(before) == len(shape):
        if any(atom.size != 1 for atom in rest):
            raise MissError(f"{node}: it is not proven to merge or split whole axes")
        return (*before[:-1], (*before[-1], *rest)) if before else ()
    sizes_after = shape[len(before) + 1 :]
    after = [group[::-1] for group in _groups(rest[::-1], sizes_after[::-1])][::-1]
    if len(after) < len(sizes_after):
        raise MissError(
            f"{node}: it is not proven to merge or split whole axes; size {shape[len(before)]} can't be composed"
        )
    return (*before, tuple(rest[: len(rest) - sum(map(len, after))]), *after)


def _groups(atoms: Sequence[Atom], sizes: Shape) -> list[tuple[Atom, ...]]:
    """The first atoms in groups of these sizes, up to the first size that none make up."""
    groups: list[tuple[Atom, ...]] = []
    for size in sizes:
        group = _take(atoms, size)
        if group is None:
            break
        groups.append(group)
        atoms = atoms[len(group) :]
    return groups


def _take(atoms: Sequence[Atom], size: int | Dim) -> tuple[Atom, ...] | None:
    """The fewest first atoms that make up this size; None if none do."""
    for count in range(len(atoms) + 1):
        if math.prod(a.size for a in atoms[:count]) == size:
            return tuple(atoms[:count])
    return None
