"""Operators on symbolic tensors: what a comparison, a sum or a choice makes of functions of the same indices."""

from __future__ import annotations

from ...graph import BOOL, FLOATS, INTEGERS, Dim, Node
from .predicates import (
    ALWAYS,
    NEVER,
    Affine,
    AtMostZero,
    Cases,
    InputElement,
    Predicate,
    SymbolicTensor,
    UnreadableError,
    as_predicate,
    combined,
    is_zero,
)


def constant_tensor(value: object, element: int) -> SymbolicTensor:
    """A tensor that has one value everywhere."""
    if element == BOOL:
        return ALWAYS if value else NEVER
    if element in FLOATS and isinstance(value, (int, float)):
        return number(float(value))
    if element in INTEGERS and isinstance(value, (int, Dim)):
        return Affine(value)
    raise UnreadableError("a constant of another type")


def number(value: float) -> Cases:
    """The same number everywhere."""
    return Cases(((ALWAYS, None, 0.0, value),))


def to_predicate(symbolic: SymbolicTensor) -> Predicate:
    """The tensor, which must be a condition."""
    if not isinstance(symbolic, Predicate):
        raise UnreadableError("not a condition")
    return symbolic


def to_affine(symbolic: SymbolicTensor) -> Affine:
    """The tensor, which must be an index."""
    if not isinstance(symbolic, Affine):
        raise UnreadableError("not an index")
    return symbolic


def to_cases(symbolic: SymbolicTensor) -> Cases:
    """The tensor as numbers: conditions are 1 and 0."""
    if isinstance(symbolic, Predicate):
        return select(symbolic, number(1.0), number(0.0))
    if isinstance(symbolic, InputElement):
        return Cases(((ALWAYS, symbolic, 1.0, 0.0),))
    if isinstance(symbolic, Cases):
        return symbolic
    raise UnreadableError("not a number per case")


def select(where: Predicate, yes: Cases, no: Cases) -> Cases:
    """yes where the condition holds, else no."""
    values = [(where.and_(t), e, f, o) for t, e, f, o in yes.values]
    values += [(where.negated().and_(t), e, f, o) for t, e, f, o in no.values]
    return Cases(tuple(v for v in values if v[0] != NEVER))


def binary(node: Node, a: SymbolicTensor, b: SymbolicTensor) -> SymbolicTensor:
    """A comparison, conjunction or sum of two tensors over the same indices."""
    if isinstance(a, Predicate) and isinstance(b, Predicate):
        match node.op:
            case "And":
                return a.and_(b)
            case "Or":
                return a.or_(b)
    if isinstance(a, Affine) and isinstance(b, Affine):
        return _indices(node, a, b)
    x, y = to_cases(a), to_cases(b)
    match node.op:
        case "Add":
            return combined(x, y, _sum)
        case "Sub":
            return combined(x, _negative(y), _sum)
        case "Mul":
            return combined(x, y, _product)
        case "Equal":
            return as_predicate(combined(x, _negative(y), _sum), is_zero)
    raise UnreadableError(str(node))


def _indices(node: Node, a: Affine, b: Affine) -> SymbolicTensor:
    difference = a.plus(b, -1)
    match node.op:
        case "Add":
            return a.plus(b)
        case "Sub":
            return difference
        case "Mul":
            if b.steps and a.steps:
                raise UnreadableError(str(node))
            return b.times(a.const) if b.steps else a.times(b.const)
        case "LessOrEqual":
            found = AtMostZero(difference)
        case "Less":
            found = AtMostZero(difference.plus(Affine(1)))
        case "GreaterOrEqual":
            found = AtMostZero(difference.times(-1))
        case "Greater":
            found = AtMostZero(difference.times(-1).plus(Affine(1)))
        case _:
            raise UnreadableError(str(node))
    return Predicate(frozenset({frozenset({found})}))


def _negative(cases: Cases) -> Cases:
    return Cases(tuple((t, e, -f, -o) for t, e, f, o in cases.values))


def _sum(
    e: InputElement | None, f: float, o: float, e2: InputElement | None, f2: float, o2: float
) -> tuple[InputElement | None, float, float]:
    if e is not None and e2 is not None:
        raise UnreadableError("a sum of elements")
    return e or e2, f if e is not None else f2, o + o2


def _product(
    e: InputElement | None, f: float, o: float, e2: InputElement | None, f2: float, o2: float
) -> tuple[InputElement | None, float, float]:
    if e is not None and e2 is not None:
        raise UnreadableError("a product of elements")
    element, factor, offset, number = (e, f, o, o2) if e2 is None else (e2, f2, o2, o)
    return element, factor * number, offset * number
