"""From a Softmax back to the score MatMul (scale, softcap, mask terms, sinks) and forward to the value MatMul.

Walking back, `factor` is what the scores are multiplied by between the current tensor and the softmax, so a term that
is added there counts `factor` times whatever order the exporter chose. Each helper raises MissError with its reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..graph import Dim, Node
from .decoder import Decoder, is_float_cast
from .layout import data_input, scaled_input
from .layout import factor as constant_factor
from .site import Added, Filled, MaskTerm, MissError

MATMULS = ("MatMul", "com.microsoft.FusedMatMul")
LEAST_FILL = -1e30
EXPLICIT_SOFTMAX_AXIS = 13


@dataclass(frozen=True, slots=True)
class Scores:
    """The score MatMul and what happens between it and the softmax, in the op's own order."""

    matmul: Node
    scale: float
    softcap: float
    mask: tuple[MaskTerm, ...]
    sink: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """The value MatMul and what happens between the softmax and it."""

    matmul: Node
    nan_to_zero: bool
    nodes: tuple[Node, ...]


def check_softmax(decoder: Decoder, node: Node) -> None:
    """Raise MissError unless the softmax runs over the last axis."""
    rank = decoder.shapes.rank(node.inputs[0])
    axis = node.attr("axis", -1 if decoder.graph.opset >= EXPLICIT_SOFTMAX_AXIS else 1)
    if axis != -1 and (rank is None or axis != rank - 1):
        raise MissError(f"softmax over axis {axis}: expected the last axis, which holds the tokens")


def scores_before(decoder: Decoder, softmax: Node) -> Scores | None:
    """Walk back from the softmax; None if no MatMul lies behind it, MissError if something on the way is not known."""
    walk = _Walk(decoder)
    return walk.back(softmax.inputs[0])


class _Walk:
    """The walk back: what was met between the softmax and the current tensor."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.factor = 1.0
        self.softcap = 0.0
        self.mask: list[MaskTerm] = []
        self.sink = ""
        self.nodes: list[Node] = []

    def back(self, tensor: str) -> Scores | None:
        graph = self.decoder.graph
        while True:
            node = graph.producer(tensor)
            if node is None:
                return None
            self.nodes.append(node)
            if node.op in MATMULS:
                self._check_reshapes(node)
                scale = self.factor * node.attr("alpha", 1.0)
                return Scores(node, scale, self.softcap, tuple(self.mask), self.sink, tuple(self.nodes))
            source = self._step(node)
            if source is None:
                return None
            tensor = source

    def _step(self, node: Node) -> str | None:
        """Take one node into account and return the input that carries the scores; None if it is no scores chain."""
        match node.op:
            case "Identity":
                return node.inputs[0]
            case "Cast":
                return node.inputs[0] if is_float_cast(self.decoder.shapes, node) else None
            case "Mul" | "Div":
                return self._scaled(node)
            case "Add":
                return self._added(node)
            case "Where":
                return self._filled(node)
            case "Reshape":
                return self._reshaped(node)
            case "Concat":
                return self._sunk(node)
            case "Sub":
                return self._shifted(node)
        return None

    def _scaled(self, node: Node) -> str | None:
        source = scaled_input(self.decoder, node)
        if source is None:
            return None
        self.factor *= constant_factor(self.decoder, node, source)
        tanh = self.decoder.graph.producer(source)
        return source if tanh is None or tanh.op != "Tanh" else self._capped(tanh)

    def _capped(self, tanh: Node) -> str:
        inner = self.decoder.graph.producer(tanh.inputs[0])
        source = scaled_input(self.decoder, inner) if inner is not None and inner.op in ("Mul", "Div") else None
        if inner is None or source is None:
            raise MissError(f"{tanh}: expected a constant factor in front of it, as in cap * tanh(scores / cap)")
        cap = self.factor
        slope = constant_factor(self.decoder, inner, source)
        if self.softcap or not math.isclose(cap * slope, 1.0, rel_tol=1e-6):
            raise MissError(f"{tanh}: expected cap * tanh(scores / cap), got {cap} * tanh({slope} * scores)")
        self.softcap, self.factor = cap, 1.0
        self.nodes += [tanh, inner]
        return source

    def _added(self, node: Node) -> str | None:
        behind = [carries_scores(self.decoder, name) for name in node.inputs]
        if behind[0] == behind[1]:
            return None
        source, term = node.inputs if behind[0] else node.inputs[::-1]
        self._no_mask_before_cap(node)
        self.mask.append(Added(term, *self._lie(node, term)))
        return source

    def _filled(self, node: Node) -> str | None:
        condition, yes, no = node.inputs
        keep = carries_scores(self.decoder, yes)
        source, fill_tensor = (yes, no) if keep else (no, yes)
        fill = self.decoder.shapes.scalar(fill_tensor)
        if fill is None:
            return None
        if fill > LEAST_FILL:
            raise MissError(f"{node}: expected a fill of at most {LEAST_FILL:g} (or -inf), got {fill}")
        self._no_mask_before_cap(node)
        self.mask.append(Filled(condition, keep, fill, *self._lie(node, condition)))
        return source

    def _no_mask_before_cap(self, node: Node) -> None:
        if self.softcap:
            raise MissError(f"{node}: a mask inside the softcap; expected it after the tanh")

    def _lie(self, node: Node, term: str) -> tuple[int, float, bool]:
        """Axes of a term, its factor, and whether it lies as ((B H), S, T), like scores computed by a 3-D MatMul."""
        shape, scores_rank = self.decoder.shapes.shape(term), self.decoder.shapes.rank(node.outputs[0])
        if shape is None or scores_rank is None or len(shape) > 4:
            raise MissError(f"{node}: the number of axes of {term!r} is not known to be at most 4")
        return len(shape), self.factor, scores_rank == 3 and len(shape) == 3 and shape[0] != 1

    def _reshaped(self, node: Node) -> str:
        before, after = (self.decoder.shapes.shape(name) for name in (node.inputs[0], node.outputs[0]))
        if before is None or after is None or {len(before), len(after)} != {3, 4}:
            raise MissError(f"{node}: expected a reshape between ((B H), S, T) and (B, H, S, T)")
        return node.inputs[0]

    def _check_reshapes(self, matmul: Node) -> None:
        product = self.decoder.shapes.shape(matmul.outputs[0])
        for node in self.nodes:
            after = self.decoder.shapes.shape(node.outputs[0]) if node.op == "Reshape" else None
            if after is not None and (product is None or after[-2] != product[-2]):
                raise MissError(f"{node}: it is not proven to keep the query's tokens on the axis before the last")

    def _sunk(self, node: Node) -> str | None:
        rank = self.decoder.shapes.rank(node.outputs[0])
        if rank != 4 or len(node.inputs) != 2 or node.attr("axis", 0) not in (-1, 3) or self.sink:
            return None
        scores, sink = node.inputs
        if not carries_scores(self.decoder, scores):
            return None
        if self.factor != 1.0 or self.mask or self.softcap:
            raise MissError(f"{node}: sink logits joined before the scores are scaled or masked; expected after")
        origin = self.decoder.graph.producer(sink)
        self.sink = origin.inputs[0] if origin is not None and origin.op == "Expand" else sink
        shape = self.decoder.shapes.shape(self.sink)
        if shape is None or len(shape) != 4 or not (shape[0] == shape[2] == shape[3] == 1):
            raise MissError(f"{node}: expected one sink logit per head, shape (1, heads, 1, 1), got {_text(shape)}")
        return scores

    def _shifted(self, node: Node) -> str | None:
        """x - max(x), which a softmax does not see."""
        shift = self.decoder.graph.producer(node.inputs[1])
        if shift is None or shift.op != "ReduceMax" or shift.inputs[0] != node.inputs[0]:
            return None
        if reduced_axes(self.decoder, shift) not in ([-1], [3]) or not shift.attr("keepdims", 1):
            raise MissError(f"{shift}: expected the maximum over the last axis, kept")
        self.nodes.append(shift)
        return node.inputs[0]


def carries_scores(decoder: Decoder, tensor: str) -> bool:
    """Whether a tensor is a product of a query with a cache, possibly scaled or masked: a MatMul lies behind it."""
    chain = ("Identity", "Cast", "Mul", "Div", "Add", "Where", "Reshape", "Tanh")
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop()
        node = decoder.graph.producer(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if node.op in MATMULS:
            if _reads_cache(decoder, node.inputs[1]):
                return True
        elif node.op in chain:
            pending += node.inputs[:1] if node.op == "Reshape" else node.inputs
    return False


def _reads_cache(decoder: Decoder, tensor: str) -> bool:
    while tensor not in decoder.caches:
        node = decoder.graph.producer(tensor)
        source = None if node is None else data_input(decoder, node)
        if source is None:
            return False
        tensor = source
    return True


def reduced_axes(decoder: Decoder, node: Node) -> list[int] | None:
    """Axes of a reduction, from its attribute or input."""
    if node.input(1):
        value = decoder.shapes.value(node.input(1))
        return None if value is None or any(isinstance(x, Dim) for x in value.flat) else [int(x) for x in value.flat]
    axes = node.attr("axes")
    return None if axes is None else list(axes)


def product_after(decoder: Decoder, softmax: Node, sink: str) -> Product | None:
    """Walk on from the softmax to the MatMul with the values; None if it leads nowhere, MissError if it forks."""
    graph, tensor, nodes, nan_to_zero, dropped = decoder.graph, softmax.outputs[0], [], False, not sink
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
        reshaped = node.op == "Reshape" and decoder.shapes.rank(node.outputs[0]) in (3, 4)
        if node.op in ("Identity", "Dropout") or reshaped or is_float_cast(decoder.shapes, node):
            tensor = node.outputs[0]
        elif node.op == "Slice" and not dropped and _drops_last(decoder, node):
            dropped, tensor = True, node.outputs[0]
        else:
            return None


def _nan_guard(decoder: Decoder, tensor: str, readers: list[Node]) -> list[Node] | None:
    """The nodes IsNaN and Where of where(isnan(x), 0, x), if that is all that reads x."""
    checks = [n for n in readers if n.op == "IsNaN"]
    wheres = [n for n in readers if n.op == "Where"]
    if len(checks) != 1 or len(wheres) != 1 or len(readers) != 2:
        return None
    check, where = checks[0], wheres[0]
    if where.inputs[0] != check.outputs[0] or where.inputs[2] != tensor:
        return None
    if decoder.shapes.scalar(where.inputs[1]) != 0.0:
        raise MissError(f"{where}: expected NaN to become 0")
    return [check, where]


def _drops_last(decoder: Decoder, node: Node) -> bool:
    def values(i: int) -> list[object] | None:
        value = decoder.shapes.value(node.input(i)) if node.input(i) else None
        return None if value is None else list(value.flat)

    return values(1) == [0] and values(2) == [-1] and values(3) in ([3], [-1]) and values(4) in (None, [1])


def _text(shape: object) -> str:
    return "unknown" if shape is None else str(tuple(map(str, shape)))  # type: ignore[call-overload]
