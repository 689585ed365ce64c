"""Reads the nodes behind a tensor as a function of its indices, see `predicates`.

Source: the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...graph import BOOL, FLOATS, INTEGERS, OPEN_END, Dim, Node, TooComplexError, divide
from ..decoder_graph import DecoderGraph
from .operators import binary, constant_tensor, number, select, to_affine, to_cases, to_predicate
from .predicates import (
    Affine,
    AtMostZero,
    Cases,
    InputElement,
    Predicate,
    SymbolicTensor,
    UnreadableError,
    affine,
    as_predicate,
    composed,
    is_zero,
    shifted,
)

MAX_DEPTH = 200
REGROUPS = ("Reshape", "Unsqueeze", "Squeeze", "Flatten")


class MaskReader:
    """Reads tensors of one model as tensors; each is read once."""

    def __init__(self, decoder: DecoderGraph) -> None:
        self._decoder = decoder
        self._tensors: dict[str, SymbolicTensor] = {}
        self._depth = 0

    def read(self, tensor: str) -> SymbolicTensor:
        """The tensor as a function of its indices. Raises UnreadableError."""
        if tensor not in self._tensors:
            self._depth += 1
            try:
                if self._depth > MAX_DEPTH:
                    raise UnreadableError("too deep")
                self._tensors[tensor] = self._read(tensor)
            finally:
                self._depth -= 1
        return self._tensors[tensor]

    def predicate(self, tensor: str) -> Predicate:
        """A boolean tensor."""
        return to_predicate(self.read(tensor))

    def cases(self, tensor: str) -> Cases:
        """A float tensor."""
        return to_cases(self.read(tensor))

    def _read(self, tensor: str) -> SymbolicTensor:
        shapes = self._decoder.shapes
        value = shapes.value(tensor)
        if value is not None and value.size == 1:
            return constant_tensor(value.item(), shapes.element(tensor))
        node = self._decoder.graph.producer(tensor)
        if node is not None:
            return self._rule(node)
        if tensor not in self._decoder.graph.inputs:
            raise UnreadableError(tensor)
        return InputElement(tensor, tuple(affine(0, {axis: 1}) for axis in range(len(self._shape(tensor)))))

    def _rule(self, node: Node) -> SymbolicTensor:
        rule = RULES.get(node.op)
        try:
            if rule is not None:
                return rule(self, node)
            if len(node.inputs) == 2:
                return binary(node, self._aligned(node, 0), self._aligned(node, 1))
        except TooComplexError:
            raise
        except (ArithmeticError, IndexError, TypeError, ValueError) as error:
            # Sizes where numbers should be, or more or fewer of them than the operator takes.
            raise UnreadableError(f"{node}: {error}") from error
        raise UnreadableError(str(node))

    def _shape(self, tensor: str) -> Sequence[int | Dim]:
        shape = self._decoder.shapes.shape(tensor)
        if shape is None:
            raise UnreadableError(tensor)
        return shape

    def _aligned(self, node: Node, index: int) -> SymbolicTensor:
        """Input `index` of a broadcasting node as a function of the output's indices."""
        before, after = self._shape(node.inputs[index]), self._shape(node.outputs[0])
        lift = len(after) - len(before)
        pairs = (pair for shape in self._beside(node) for pair in zip(before[::-1], shape[::-1], strict=False))
        if any(_falls_short(*pair) for pair in pairs):
            raise UnreadableError(str(node))
        moved = {axis: affine(0, {axis + lift: 1}) for axis in range(len(before))}
        moved |= {axis: Affine(0) for axis, size in enumerate(before) if size == 1 != after[axis + lift]}
        return composed(self.read(node.inputs[index]), moved)

    def _beside(self, node: Node) -> list[Sequence[int | Dim]]:
        """The shapes that a broadcasting node brings together."""
        if node.op != "Expand":
            return [self._shape(name) for name in node.inputs]
        to = self._decoder.shapes.value(node.inputs[1])
        return [self._shape(node.outputs[0]) if to is None else list(to.flat)]

    def _same(self, node: Node) -> SymbolicTensor:
        return self.read(node.inputs[0])

    def _negated(self, node: Node) -> SymbolicTensor:
        return to_predicate(self.read(node.inputs[0])).negated()

    def _expand(self, node: Node) -> SymbolicTensor:
        return self._aligned(node, 0)

    def _cast(self, node: Node) -> SymbolicTensor:
        symbolic, to = self.read(node.inputs[0]), node.attr("to")
        if to == BOOL:
            return symbolic if isinstance(symbolic, Predicate) else as_predicate(to_cases(symbolic), is_zero).negated()
        if to in FLOATS:
            return to_cases(symbolic)
        whole = self._decoder.shapes.element(node.inputs[0]) not in FLOATS
        if to in INTEGERS and whole and isinstance(symbolic, (Affine, InputElement)):
            return symbolic
        raise UnreadableError(str(node))

    def _range(self, node: Node) -> SymbolicTensor:
        start, delta = self.read(node.inputs[0]), self.read(node.inputs[2])
        if not isinstance(start, Affine) or not isinstance(delta, Affine) or start.steps or delta.steps:
            raise UnreadableError(str(node))
        return affine(start.const, {0: delta.const})

    def _filled(self, node: Node) -> SymbolicTensor:
        array = self._decoder.graph.constant_attribute(node, "value")
        element = self._decoder.shapes.element(node.outputs[0])
        return constant_tensor(0.0 if array is None else array.item(), element)

    def _regrouped(self, node: Node) -> SymbolicTensor:
        """Moves that, taken together with those right before, only add and remove axes of size 1."""
        base = node
        while (source := self._decoder.graph.producer(base.inputs[0])) is not None and source.op in REGROUPS:
            base = source
        before, after = self._shape(base.inputs[0]), self._shape(node.outputs[0])
        old = [axis for axis, size in enumerate(before) if size != 1]
        new = [axis for axis, size in enumerate(after) if size != 1]
        if [before[axis] for axis in old] != [after[axis] for axis in new]:
            raise UnreadableError(str(node))
        return shifted(self.read(base.inputs[0]), dict(zip(old, new, strict=True)))

    def _slice(self, node: Node) -> SymbolicTensor:
        starts, ends, axes, steps = (
            self._decoder.shapes.value(node.input(i)) if node.input(i) else None for i in range(1, 5)
        )
        if starts is None or ends is None or (steps is not None and any(step != 1 for step in steps.flat)):
            raise UnreadableError(str(node))
        sizes = self._shape(node.inputs[0])
        rank = len(sizes)
        places = range(len(starts)) if axes is None else [axis % rank for axis in axes.flat]
        moved = {axis: affine(0, {axis: 1}) for axis in range(rank)}
        for axis, start, end in zip(places, starts.flat, ends.flat, strict=True):
            if not isinstance(start, int) or start < 0 or not _is_long(sizes[axis], end):
                raise UnreadableError(str(node))
            if _falls_short(sizes[axis], end) or self._counts_sequences(end):
                raise UnreadableError(str(node))
            moved[axis] = affine(start, {axis: 1})
        return composed(self.read(node.inputs[0]), moved)

    def _counts_sequences(self, end: int | Dim) -> bool:
        """Whether a size is that of the batch: of a lone sequence it leaves one element, to be broadcast."""
        sources = self._decoder.shapes.sources.get(end.name or "", ()) if isinstance(end, Dim) else ()
        inputs = self._decoder.graph.inputs
        return any(place.is_size and place.place == 0 and place.tensor in inputs for place in sources)

    def _trilu(self, node: Node) -> SymbolicTensor:
        rank = len(self._shape(node.inputs[0]))
        diagonal = self.read(node.input(1)) if node.input(1) else Affine(0)
        if not isinstance(diagonal, Affine) or diagonal.steps:
            raise UnreadableError(str(node))
        below = affine(diagonal.const, {rank - 2: 1, rank - 1: -1})  # at most 0 on and above the diagonal
        kept = AtMostZero(below if node.attr("upper", 1) else below.times(-1))
        where = Predicate(frozenset({frozenset({kept})}))
        symbolic = self.read(node.inputs[0])
        if isinstance(symbolic, Predicate):
            return symbolic.and_(where)
        return select(where, to_cases(symbolic), number(0.0))

    def _stacked(self, node: Node) -> SymbolicTensor:
        """Index vectors: integer functions side by side along a last axis of size 1 each."""
        if len(node.inputs) == 1:
            return self.read(node.inputs[0])
        rank = len(self._shape(node.outputs[0]))
        parts = [self.read(name) for name in node.inputs]
        sizes = {self._shape(name)[-1] for name in node.inputs}
        if node.attr("axis", 0) not in (-1, rank - 1) or sizes != {1}:
            raise UnreadableError(str(node))
        return tuple(to_affine(part) for part in parts)

    def _gather(self, node: Node) -> SymbolicTensor:
        """Elements of a matrix seen as a column, at flat positions row * columns + column."""
        flat = self._decoder.graph.producer(node.inputs[0])
        if flat is None or flat.op not in REGROUPS or node.attr("axis", 0) != 0:
            raise UnreadableError(str(node))
        position, sizes = self.read(node.inputs[1]), self._shape(flat.inputs[0])
        if len(sizes) != 2:
            raise UnreadableError(str(node))
        if self._shape(node.inputs[0])[1:] not in ((), (1,)) or not isinstance(position, Affine):
            raise UnreadableError(str(node))
        row, column = Affine(0), Affine(0)
        for axis, step in (*position.steps, (None, position.const)):
            whole = divide(step, sizes[1])
            part = Affine(1) if axis is None else affine(0, {axis: 1})
            row, column = (row.plus(part.times(whole)), column) if whole else (row, column.plus(part.times(step)))
        return composed(self.read(flat.inputs[0]), {0: row, 1: column})

    def _gather_nd(self, node: Node) -> SymbolicTensor:
        index = self.read(node.inputs[1])
        if not isinstance(index, tuple) or node.attr("batch_dims", 0) or len(index) != len(self._shape(node.inputs[0])):
            raise UnreadableError(str(node))
        return composed(self.read(node.inputs[0]), dict(enumerate(index)))

    def _scatter_nd(self, node: Node) -> SymbolicTensor:
        """Updates that take the place of everything: each element is written at its own index."""
        index = self.read(node.inputs[1])
        own = tuple(affine(0, {axis: 1}) for axis in range(len(self._shape(node.inputs[0]))))
        sizes = self._shape(node.inputs[0])
        if node.attr("reduction", "none") != "none" or not isinstance(index, tuple) or len(index) != len(own):
            raise UnreadableError(str(node))
        for axis, (part, expected) in enumerate(zip(index, own, strict=True)):
            if part != expected and not (sizes[axis] == 1 and part in (Affine(0), expected)):
                raise UnreadableError(str(node))
        if list(self._shape(node.inputs[2])) != list(sizes):
            raise UnreadableError(str(node))
        return self.read(node.inputs[2])

    def _where(self, node: Node) -> SymbolicTensor:
        where = to_predicate(self._aligned(node, 0))
        yes, no = self._aligned(node, 1), self._aligned(node, 2)
        if isinstance(yes, Predicate) and isinstance(no, Predicate):
            return where.and_(yes).or_(where.negated().and_(no))
        return select(where, to_cases(yes), to_cases(no))


RULES: Mapping[str, Callable[[MaskReader, Node], SymbolicTensor]] = {
    "Identity": MaskReader._same,
    "Cast": MaskReader._cast,
    "Range": MaskReader._range,
    "ConstantOfShape": MaskReader._filled,
    **dict.fromkeys(REGROUPS, MaskReader._regrouped),
    "Expand": MaskReader._expand,
    "Slice": MaskReader._slice,
    "Trilu": MaskReader._trilu,
    "Concat": MaskReader._stacked,
    "Gather": MaskReader._gather,
    "GatherND": MaskReader._gather_nd,
    "ScatterND": MaskReader._scatter_nd,
    "Not": MaskReader._negated,
    "Where": MaskReader._where,
}


def _falls_short(size: int | Dim, whole: int | Dim) -> bool:
    """Whether an axis is never longer than another but at times shorter, as new tokens beside all: one is repeated."""
    rest = whole - size
    return isinstance(rest, Dim) and all(count > 0 for _, count in rest.terms)


def _is_long(size: int | Dim, end: int | Dim) -> bool:
    """Whether a slice up to `end` can't leave one element, to be broadcast, of an axis that had more unnoticed."""
    if isinstance(end, Dim):
        return not any("{" in name for name in end.symbols)
    return isinstance(size, int) or end >= OPEN_END
