"""How much a tensor's numbers grow when the past length P grows by one: what each operator makes of it.

A shift is a number; SOME, a number that is not known but the same for all tokens; or LOST. An axis is long if its size
grows with P: it holds all tokens, those of a shorter row at its end. So a place on it must be told from its end or from
P; sums and products along it are lost, but for those of a model's inputs, in which padding is 0.
Source: the ONNX operator specification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from ..graph import OPEN_END, Dim
from ..naming import is_encoder_name
from ..patterns import PAST_LENGTH, DecoderGraph

SOME: Final = "some"
LOST: Final = "lost"
Shift = int | Literal["some", "lost"]

MOVES = frozenset({"Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Tile"})
COMPARISONS = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
ALIKE = frozenset({"Where", "Min", "Max", "Concat"})
MADE_FROM_SIZES = frozenset({"Range", "ConstantOfShape", "Expand", "Tile", "Reshape"})
EACH_ALONE = frozenset(
    {"And", "Or", "Not", "Xor", "IsNaN", "Abs", "Neg", "Sign", "Sqrt", "Log", "Exp", "Floor", "Ceil", "Mod", "Pow"}
    | {"Clip", "Relu", "Sigmoid", "Tanh", "Erf", "Sin", "Cos", "Reciprocal", "BitwiseAnd"}
)


@dataclass(frozen=True, slots=True)
class Operation:
    """A node as the rules see it: `attr(name, default)` is its attribute."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attr: Callable[[str, Any], Any]
    name: str

    def input(self, i: int) -> str:
        """Name of input i, "" if it is absent."""
        return self.inputs[i] if i < len(self.inputs) else ""


class Sizes:
    """Which sizes and known values grow with P. An input's axis of tokens that is not that of new ones is P + S long.

    constants: values by name that the decoder does not know.
    """

    def __init__(self, decoder: DecoderGraph, constants: Mapping[str, Sequence[Any]]) -> None:
        self._decoder = decoder
        self._constants = constants
        self._long: set[str] = set()
        self._columns: dict[str, tuple[Shift, ...]] = {}
        self._symbols = {PAST_LENGTH, *_total_symbols(decoder)}

    def growth(self, size: int | Dim) -> Shift:
        """What a size grows by with P."""
        terms = size.terms if isinstance(size, Dim) else ()
        growing = [(monomial, count) for monomial, count in terms if self._symbols & {*monomial}]
        return LOST if any(len(monomial) > 1 for monomial, _ in growing) else sum(count for _, count in growing)

    def axis(self, tensor: str, axis: int) -> Shift:
        """What an axis of a tensor grows by; LOST where its size is not known."""
        shape = self._decoder.shapes.shape(tensor)
        if shape is None:
            return LOST if tensor in self._long else 0
        if not -len(shape) <= axis < len(shape):
            return LOST
        whole = self._reshaped(tensor, shape, axis % len(shape))
        return self.axis(whole, axis % len(shape)) if whole else self.growth(shape[axis])

    def _reshaped(self, tensor: str, shape: Sequence[int | Dim], axis: int) -> str:
        """The matrix of an input's rows that a tensor is, cast or reshaped to as many rows; "" for others."""
        node = self._decoder.graph.producer(tensor)
        if node is None or node.op not in ("Cast", "Reshape") or len(shape) != 2 or axis != 1:
            return ""
        source = self._decoder.shapes.shape(node.inputs[0]) or ()
        return node.inputs[0] if len(source) == 2 and isinstance(shape[0], Dim) else ""

    def is_long(self, tensor: str) -> bool:
        """Whether some axis of a tensor holds all tokens."""
        shape = self._decoder.shapes.shape(tensor)
        return tensor in self._long if shape is None else any(self.growth(size) != 0 for size in shape)

    def note(self, operation: Operation, shifts: Sequence[Shift]) -> None:
        """Remember of an operation's results, where their shapes are not known, that they may hold all tokens."""
        grows = any(map(self.is_long, operation.inputs)) or (operation.op in MADE_FROM_SIZES and any(shifts))
        if grows and operation.op != "Shape":
            self._long.update(operation.outputs)
        if operation.op == "Concat":
            self._columns[operation.outputs[0]] = tuple(shifts)

    def columns(self, tensor: str) -> tuple[Shift, ...]:
        """The shift of each tensor that a Concat joined to this one; () for others."""
        return self._columns.get(tensor, ())

    def is_uniform(self, tensor: str) -> bool:
        """Whether all numbers of a tensor are the same, however many there are."""
        node = self._decoder.graph.producer(tensor)
        while node is not None and node.op in MOVES:
            node = self._decoder.graph.producer(node.inputs[0])
        return node is not None and node.op == "ConstantOfShape"

    def value(self, tensor: str) -> list[Shift] | None:
        """The shift of each element of a tensor whose values are known; None for others."""
        known = self.numbers(tensor)
        return [self.growth(x) if isinstance(x, Dim) else 0 for x in known] if known else None

    def numbers(self, tensor: str) -> list[Any]:
        """The elements of a tensor whose values are known; [] for others."""
        value = self._decoder.shapes.value(tensor) if tensor else None
        return list(self._constants.get(tensor, ())) if value is None else list(value.flat)

    def is_inputs(self, tensor: str) -> bool:
        """Whether a tensor is an input of the model, cast or compared or not."""
        graph = self._decoder.graph
        while tensor not in graph.inputs:
            node = graph.producer(tensor)
            if node is None or node.op not in MOVES | COMPARISONS | {"Not"}:
                return False
            tensor = node.inputs[0]
        return True


def _total_symbols(decoder: DecoderGraph) -> set[str]:
    """Sizes that inputs of two axes, beside the new tokens, declare for their second one."""
    names = [name for name in decoder.graph.inputs if not is_encoder_name(name)]
    shapes = {name: decoder.shapes.shape(name) or () for name in names}
    second = {name: shape[1] for name, shape in shapes.items() if len(shape) == 2 and isinstance(shape[1], Dim)}
    new = second.get("input_ids") or second.get("decoder_input_ids")
    return {size.name for size in second.values() if size.name and size != new}


Rule = Callable[[Sizes, Operation, Sequence[Shift]], Shift]


def shift_of(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    """The shift of an operation's results, whose inputs have these."""
    try:
        return RULES.get(operation.op, _other)(sizes, operation, shifts)
    except (ArithmeticError, IndexError, TypeError, ValueError):
        return LOST  # sizes where numbers should be, or more or fewer of them than the operator takes


def _other(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    """An operator that may mix what lies along an axis."""
    return LOST if any(shifts) or any(map(sizes.is_long, operation.inputs)) else 0


def _moved(_: Sizes, __: Operation, shifts: Sequence[Shift]) -> Shift:
    return shifts[0]


def _compared(_: Sizes, __: Operation, shifts: Sequence[Shift]) -> Shift:
    return 0 if shifts[0] == shifts[1] and isinstance(shifts[0], int) else LOST


def _alike(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    """A choice between tensors that shift alike, by a condition that does not; only uniform numbers may grow more."""
    if operation.op == "Concat":
        growing = [name for name in operation.inputs if sizes.axis(name, operation.attr("axis", 0)) != 0]
        if growing and not (growing == [operation.inputs[0]] and sizes.is_uniform(growing[0])):
            return LOST
    chosen = shifts[1:] if operation.op == "Where" else shifts
    return chosen[0] if len({*chosen}) == 1 and (operation.op != "Where" or shifts[0] == 0) else LOST


def _each_alone(_: Sizes, __: Operation, shifts: Sequence[Shift]) -> Shift:
    return LOST if any(shifts) else 0


def _added(_: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    a, b = shifts
    if isinstance(a, int) and isinstance(b, int):
        return a + b if operation.op == "Add" else a - b
    return LOST if LOST in shifts else SOME


def _multiplied(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    """A shift times a number is a shift; times something that is the same for all tokens it is some shift."""
    if not any(shifts):
        return 0
    steady = next((name for name, shift in zip(operation.inputs, shifts, strict=True) if shift == 0), None)
    if (
        steady is None
        or LOST in shifts
        or (operation.op == "Div" and steady == operation.inputs[0])
        or sizes.is_long(steady)
    ):
        return LOST
    (number, *more), shift = (*sizes.numbers(steady), None), next(s for s in shifts if s != 0)
    whole = isinstance(number, int) and more == [None] and operation.op == "Mul" and isinstance(shift, int)
    return shift * number if whole and isinstance(shift, int) else SOME


def _counted(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    """Range: from P on, or along all tokens, in which a token's number grows with the place that it moves to."""
    if sizes.numbers(operation.inputs[2]) != [1]:
        return LOST
    return {(0, 0): 0, (1, 1): 1, (0, 1): 1}.get((shifts[0], shifts[1]), LOST)  # type: ignore[arg-type]


def _summed(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    """CumSum and ReduceSum: what padding adds must be 0."""
    if not sizes.is_long(operation.inputs[0]):
        return LOST if any(shifts) else 0
    return 0 if shifts[0] == 0 and sizes.is_inputs(operation.inputs[0]) else LOST


def _sliced(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    if not any(shifts) and not sizes.is_long(operation.inputs[0]):
        return 0
    if operation.input(4) and any(number != 1 for number in sizes.numbers(operation.input(4)) or [0]):
        return LOST
    starts, ends = (_Place.each(sizes, operation.input(i), shifts[i]) for i in (1, 2))
    axes = sizes.numbers(operation.input(3)) or [*range(len(starts))]
    if not len(starts) == len(ends) == len(axes):
        return LOST
    for axis, start, end in zip(axes, starts, ends, strict=True):
        long = sizes.axis(operation.inputs[0], axis)
        to_end = start.shift == -1 and end.number is not None and end.is_kept(OPEN_END, None)
        if long == 0 and (start.shift, end.shift) != (0, 0) and not to_end:
            return LOST
        if long != 0 and not (long == 1 and start.is_kept(0, 0) and end.is_kept(OPEN_END, None)):
            return LOST
    return shifts[0]


@dataclass(frozen=True, slots=True)
class _Place:
    """A bound of a slice: its number, None where that is not known, and its shift."""

    number: int | None
    shift: Shift

    @classmethod
    def each(cls, sizes: Sizes, tensor: str, shift: Shift) -> list[_Place]:
        numbers = sizes.numbers(tensor)
        shifts = sizes.value(tensor) or [shift]
        plain = [n if isinstance(n, int) else None for n in numbers] or [None]
        return [cls(n, s) for n, s in zip(plain, shifts, strict=True)]

    def is_kept(self, least: int, most: int | None) -> bool:
        """Whether the place on a long axis is told from its end or from P, or lies where the axis is open."""
        if self.number is None:
            return self.shift == 1
        return self.number < 0 or (self.number >= least and (most is None or self.number <= most))


def _gathered(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    if len(sizes.numbers(operation.inputs[0])) == 1:  # it is that element, whichever place is asked for
        return shifts[0]
    long, places = sizes.axis(operation.inputs[0], operation.attr("axis", 0)), sizes.numbers(operation.inputs[1])
    from_end = bool(places) and all(isinstance(place, int) and place < 0 for place in places)
    fits = (long == 1 and (shifts[1] == 1 or from_end)) or (long == 0 and shifts[1] == 0)
    return shifts[0] if fits else LOST


def _gathered_nd(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    """GatherND at places whose columns were joined: each must shift as its axis grows."""
    columns = sizes.columns(operation.inputs[1])
    fits = columns and not operation.attr("batch_dims", 0)
    fits = fits and all(sizes.axis(operation.inputs[0], axis) == shift for axis, shift in enumerate(columns))
    return shifts[0] if fits else _other(sizes, operation, shifts)


def _uniform(_: Sizes, __: Operation, ___: Sequence[Shift]) -> Shift:
    return 0


def _triangle(sizes: Sizes, operation: Operation, shifts: Sequence[Shift]) -> Shift:
    """Trilu: columns and rows must move against each other as much as the diagonal does."""
    columns, rows = sizes.axis(operation.inputs[0], -1), sizes.axis(operation.inputs[0], -2)
    known = sizes.value(operation.input(1))
    diagonal = 0 if not operation.input(1) else known[0] if known else shifts[1]
    numbers = (columns, rows, diagonal)
    if not all(isinstance(number, int) for number in numbers) or shifts[0] != 0:
        return LOST
    return 0 if int(columns) - int(rows) == int(diagonal) else LOST


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(COMPARISONS, _compared),
    **dict.fromkeys(ALIKE, _alike),
    **dict.fromkeys(EACH_ALONE, _each_alone),
    "Add": _added,
    "Sub": _added,
    "Mul": _multiplied,
    "Div": _multiplied,
    "Range": _counted,
    "CumSum": _summed,
    "ReduceSum": _summed,
    "Slice": _sliced,
    "Gather": _gathered,
    "GatherND": _gathered_nd,
    "Trilu": _triangle,
    "ConstantOfShape": _uniform,
}
