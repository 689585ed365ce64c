"""From a Softmax back to the product of queries and keys: scale, softcap, mask terms, floor, sinks.

Walking back, `factor` is what the scores are multiplied by between the current tensor and the softmax, so a term that
is added there counts `factor` times whatever order the exporter chose. Each helper raises MissError with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...graph import Node, Shape
from ..decoder_graph import DecoderGraph
from ..match import Added, Filled, MaskTerm, MissError
from .cache_view import factor as constant_factor
from .cache_view import scaled_input
from .contraction import Contraction, is_cache_product, read_contraction
from .softmax import is_over_last_axis

# Under the -1e9 that people write, also once it is rounded to bfloat16; next to it float32 tells no scores apart.
LEAST_FILL = -9e8
LEAST_HALF_FILL = -6e4


@dataclass(frozen=True, slots=True)
class MaskOfScores:
    """A mask term, whose layout is yet to be told from the axes of the `scores` that it meets, and its shape."""

    term: MaskTerm
    scores: str
    shape: Shape
    node: Node


@dataclass(frozen=True, slots=True)
class Scores:
    """The product of queries and keys, and what happens between it and the softmax, in the op's own order.

    sink: logits that are joined to the tensor `sunk`; both "" if none are. floored: whether hidden scores are raised
    from -inf to a finite number, which only rows that see no key can tell. nodes: from the product on.
    """

    product: Contraction
    scale: float
    softcap: float
    mask: tuple[MaskOfScores, ...]
    sink: str
    sunk: str
    floored: bool
    nodes: tuple[Node, ...]


def scores_before(decoder: DecoderGraph, logits: str) -> Scores | None:
    """Walk back from a softmax's logits; None if no such product lies behind it, MissError if a step is not known."""
    return _Walk(decoder).back(logits)


def least_fill(element: str) -> float:
    """The fill at and below which a score of this type counts as hidden, whatever the other scores."""
    return LEAST_HALF_FILL if element == "float16" else LEAST_FILL


class _Walk:
    """The walk back: what was met between the softmax and the current tensor."""

    def __init__(self, decoder: DecoderGraph) -> None:
        self.decoder = decoder
        self.factor = 1.0
        self.softcap = 0.0
        self.mask: list[MaskOfScores] = []
        self.sink = ""
        self.sunk = ""
        self.floored = False
        self.nodes: list[Node] = []

    def back(self, tensor: str) -> Scores | None:
        graph = self.decoder.graph
        while True:
            node = graph.producer(tensor)
            if node is None:
                return None
            self.nodes.append(node)
            product = read_contraction(self.decoder, node)
            if product is not None:
                scale, mask, nodes = self.factor * product.factor, tuple(self.mask), tuple(self.nodes[::-1])
                return Scores(product, scale, self.softcap, mask, self.sink, self.sunk, self.floored, nodes)
            source = self._step(node)
            if source is None:
                return None
            tensor = source

    def _step(self, node: Node) -> str | None:
        """Take one node into account and return the input that carries the scores; None if it is no scores chain."""
        match node.op:
            case "Identity" | "Reshape":
                return node.inputs[0]
            case "Cast":
                return node.inputs[0] if self.decoder.is_float_cast(node) else None
            case "Mul" | "Div":
                return self._scaled(node)
            case "Add":
                return self._added(node)
            case "Where":
                return self._filled(node)
            case "Max":
                return self._raised(node)
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
        self._masked(node, source, term, Added(term, factor=self.factor))
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
            raise MissError(f"{node}: expected a fill below every score, at most {least:g} (or -inf), got {fill}")
        self._no_mask_before_cap(node)
        self._masked(node, source, condition, Filled(condition, keep, fill, factor=self.factor))
        return source

    def _raised(self, node: Node) -> str | None:
        """max(scores, floor) of a floor that hides as well as what lies under it."""
        if len(node.inputs) != 2:
            return None
        source, floor_tensor = node.inputs if carries_scores(self.decoder, node.inputs[0]) else node.inputs[::-1]
        floor = self.decoder.shapes.scalar(floor_tensor)
        if floor is None:
            return None
        least = least_fill(self.decoder.element(source, ""))
        if floor * self.factor > least:
            raise MissError(
                f"{node}: expected a floor below every score, at most {least:g}, got {floor * self.factor:g}"
            )
        self._no_mask_before_cap(node)
        self.floored = True
        return source

    def _no_mask_before_cap(self, node: Node) -> None:
        if self.softcap:
            raise MissError(f"{node}: a mask inside the softcap; expected it after the tanh")

    def _masked(self, node: Node, source: str, tensor: str, term: MaskTerm) -> None:
        """Note a term that must leave the shape of the scores, its `source`, as it is."""
        shape, scores = (self.decoder.shapes.shape(name) for name in (tensor, source))
        if shape is None or scores is None:
            raise MissError(f"{node}: the number of axes of {tensor!r} is not known; export with shapes")
        pairs = zip(shape[::-1], scores[::-1], strict=False)
        if len(shape) > len(scores) or any(size == 1 != wider for wider, size in pairs):
            raise MissError(f"{node}: {tensor!r} is not proven to leave the scores' shape as it is")
        self.mask.append(MaskOfScores(term, source, shape, node))

    def _sunk(self, node: Node) -> str | None:
        rank = self.decoder.shapes.rank(node.outputs[0])
        if rank is None or len(node.inputs) != 2 or node.attr("axis", 0) not in (-1, rank - 1) or self.sink:
            return None
        self.sunk, sink = node.inputs
        if not carries_scores(self.decoder, self.sunk):
            return None
        if self.factor != 1.0 or self.mask or self.softcap:
            raise MissError(f"{node}: sink logits joined before the scores are scaled or masked; expected after")
        origin = self.decoder.graph.producer(sink)
        self.sink = origin.inputs[0] if origin is not None and origin.op == "Expand" else sink
        shape, scores = (self.decoder.shapes.shape(name) for name in (self.sink, self.sunk))
        expected = None if scores is None else (1, *scores[1:-2], 1, 1)
        if shape is None or shape != expected:
            raise MissError(f"{node}: expected a sink logit for each head, shape {_text(expected)}, got {_text(shape)}")
        return self.sunk

    def _shifted(self, node: Node) -> str | None:
        """x - max(x), which a softmax does not see."""
        shift = self.decoder.graph.producer(node.inputs[1])
        if shift is None or shift.op != "ReduceMax" or shift.inputs[0] != node.inputs[0]:
            return None
        if not is_over_last_axis(self.decoder, shift):
            raise MissError(f"{shift}: expected the maximum over the last axis, kept")
        self.nodes.append(shift)
        return node.inputs[0]


def carries_scores(decoder: DecoderGraph, tensor: str) -> bool:
    """Whether a product of a query with a cache, possibly scaled or masked, lies behind a tensor."""
    chain = ("Identity", "Cast", "Mul", "Div", "Add", "Where", "Max", "Reshape", "Tanh")
    pending, seen = [tensor], set()
    while pending:
        name = pending.pop()
        node = decoder.graph.producer(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if is_cache_product(decoder, node):
            return True
        if node.op in chain:
            pending += node.inputs[:1] if node.op == "Reshape" else node.inputs
    return False


def _text(shape: object) -> str:
    return "unknown" if shape is None else str(tuple(map(str, shape)))  # type: ignore[call-overload]
