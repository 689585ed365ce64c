"""From a Softmax back to the score MatMul: scale, softcap, mask terms, sinks.

Walking back, `factor` is what the scores are multiplied by between the current tensor and the softmax, so a term that
is added there counts `factor` times whatever order the exporter chose. Each helper raises MissError with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..graph import Node
from .decoder import Decoder, is_float_cast
from .layout import data_input, scaled_input
from .layout import factor as constant_factor
from .site import Added, Filled, MaskTerm, MissError
from .softmax import is_over_last_axis

MATMULS = ("MatMul", "com.microsoft.FusedMatMul")
LEAST_FILL = -1e30
LEAST_HALF_FILL = -6e4


@dataclass(frozen=True, slots=True)
class Scores:
    """The score MatMul and what happens between it and the softmax, in the op's own order."""

    matmul: Node
    scale: float
    softcap: float
    mask: tuple[MaskTerm, ...]
    sink: str
    nodes: tuple[Node, ...]


def scores_before(decoder: Decoder, logits: str) -> Scores | None:
    """Walk back from a softmax's logits; None if no MatMul lies behind it, MissError if a step is not known."""
    return _Walk(decoder).back(logits)


def least_fill(element: str) -> float:
    """The fill at and below which a score of this type counts as hidden, whatever the other scores."""
    return LEAST_HALF_FILL if element == "float16" else LEAST_FILL


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
        """factor * tanh(x), which is cap * tanh(scores / cap) of scores = factor * x, whatever scaled x."""
        if self.softcap:
            raise MissError(f"{tanh}: a softcap inside another; expected one")
        self.softcap = abs(self.factor)
        self.nodes.append(tanh)
        return tanh.inputs[0]

    def _added(self, node: Node) -> str | None:
        behind = [carries_scores(self.decoder, name) for name in node.inputs]
        if behind[0] == behind[1]:
            return None
        source, term = node.inputs if behind[0] else node.inputs[::-1]
        self._no_mask_before_cap(node)
        self.mask.append(Added(term, *self._lie(node, source, term)))
        return source

    def _filled(self, node: Node) -> str | None:
        condition, yes, no = node.inputs
        keep = carries_scores(self.decoder, yes)
        source, fill_tensor = (yes, no) if keep else (no, yes)
        fill = self.decoder.shapes.scalar(fill_tensor)
        if fill is None:
            return None
        least = least_fill(self.decoder.element(source, ""))
        if fill > least:
            raise MissError(f"{node}: expected a fill of at most {least:g} (or -inf), got {fill}")
        self._no_mask_before_cap(node)
        self.mask.append(Filled(condition, keep, fill, *self._lie(node, source, condition)))
        return source

    def _no_mask_before_cap(self, node: Node) -> None:
        if self.softcap:
            raise MissError(f"{node}: a mask inside the softcap; expected it after the tanh")

    def _lie(self, node: Node, source: str, term: str) -> tuple[int, float, bool]:
        """Axes of a term, its factor, and whether it lies as ((B H), S, T), like scores computed by a 3-D MatMul."""
        shape, scores = (self.decoder.shapes.shape(name) for name in (term, source))
        if shape is None or scores is None or len(shape) > 4:
            raise MissError(f"{node}: the number of axes of {term!r} is not known to be at most 4")
        pairs = zip(shape[::-1], scores[::-1], strict=False)
        if len(shape) > len(scores) or any(size == 1 != wider for wider, size in pairs):
            raise MissError(f"{node}: {term!r} is not proven to leave the scores' shape as it is")
        return len(shape), self.factor, len(scores) == 3 and len(shape) == 3 and shape[0] != 1

    def _reshaped(self, node: Node) -> str:
        before, after = (self.decoder.shapes.shape(name) for name in (node.inputs[0], node.outputs[0]))
        if before is None or after is None or {len(before), len(after)} != {3, 4}:
            raise MissError(f"{node}: expected a reshape between ((B H), S, T) and (B, H, S, T)")
        return node.inputs[0]

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
        heads = (self.decoder.shapes.shape(scores) or (None, None))[1]
        if shape is None or shape != (1, heads, 1, 1):
            raise MissError(f"{node}: expected a sink logit for each head, shape (1, heads, 1, 1), got {_text(shape)}")
        return scores

    def _shifted(self, node: Node) -> str | None:
        """x - max(x), which a softmax does not see."""
        shift = self.decoder.graph.producer(node.inputs[1])
        if shift is None or shift.op != "ReduceMax" or shift.inputs[0] != node.inputs[0]:
            return None
        if not is_over_last_axis(self.decoder, shift):
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


def _text(shape: object) -> str:
    return "unknown" if shape is None else str(tuple(map(str, shape)))  # type: ignore[call-overload]
