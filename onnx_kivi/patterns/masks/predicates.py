"""Tensors as functions of their own indices: the algebra in which a mask is understood without running it.

An integer tensor is an affine function of its indices, a boolean one a disjunction of conjunctions of comparisons of
such functions and of elements of a graph input, a float one a value per case. What can't be expressed raises
UnreadableError.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from ...graph import Dim

MAX_CASES = 32
MAX_LITERALS = 8


class UnreadableError(Exception):
    """The tensor is no function of its indices that this module can express."""


@dataclass(frozen=True, slots=True)
class Affine:
    """const + the sum of step * index over (axis, step) in `steps`, which are sorted and not 0."""

    const: int | Dim
    steps: tuple[tuple[int, int | Dim], ...] = ()

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        """self + factor * other."""
        steps = dict(self.steps)
        for axis, step in other.steps:
            steps[axis] = steps.get(axis, 0) + step * factor
        return affine(self.const + other.const * factor, steps)

    def times(self, factor: int | Dim) -> Affine:
        """self * factor."""
        return affine(self.const * factor, {axis: step * factor for axis, step in self.steps})

    def at(self, indices: Mapping[int, Affine]) -> Affine:
        """self with functions of other indices in the place of its own."""
        total = Affine(self.const)
        for axis, step in self.steps:
            total = total.plus(indices[axis].times(step))
        return total


def affine(const: int | Dim, steps: Mapping[int, int | Dim]) -> Affine:
    """The normal form."""
    return Affine(const, tuple(sorted((axis, step) for axis, step in steps.items() if step != 0)))


@dataclass(frozen=True, slots=True)
class AtMostZero:
    """True where the function is 0 or less."""

    of: Affine

    def negated(self) -> AtMostZero:
        """True where the function is at least 1."""
        return AtMostZero(Affine(1).plus(self.of, -1))

    def at(self, indices: Mapping[int, Affine]) -> AtMostZero:
        """The same of other indices."""
        return AtMostZero(self.of.at(indices))


@dataclass(frozen=True, slots=True)
class InputElement:
    """An element of a graph input; as a condition, whether it is not 0 (or, if `zero`, whether it is)."""

    tensor: str
    index: tuple[Affine, ...]
    zero: bool = False

    def negated(self) -> InputElement:
        """The opposite condition."""
        return InputElement(self.tensor, self.index, not self.zero)

    def at(self, indices: Mapping[int, Affine]) -> InputElement:
        """The same of other indices."""
        return InputElement(self.tensor, tuple(i.at(indices) for i in self.index), self.zero)


Literal = AtMostZero | InputElement


@dataclass(frozen=True, slots=True)
class Predicate:
    """A disjunction of conjunctions."""

    cases: frozenset[frozenset[Literal]]

    def at(self, indices: Mapping[int, Affine]) -> Predicate:
        """The same of other indices."""
        return Predicate(frozenset(frozenset(literal.at(indices) for literal in case) for case in self.cases))

    def negated(self) -> Predicate:
        """The opposite."""
        out = ALWAYS
        for case in self.cases:
            out = out.and_(Predicate(frozenset(frozenset({literal.negated()}) for literal in case)))
        return out

    def and_(self, other: Predicate) -> Predicate:
        """Both."""
        return _simple(a | b for a in self.cases for b in other.cases)

    def or_(self, other: Predicate) -> Predicate:
        """Either."""
        return _simple(self.cases | other.cases)


ALWAYS, NEVER = Predicate(frozenset({frozenset()})), Predicate(frozenset())


def _simple(cases: Iterable[frozenset[Literal]]) -> Predicate:
    """Drop what is implied within a case, cases that can't be or imply another, and x from (not x) or (x and y)."""
    kept: set[frozenset[Literal]] = set()
    for case in cases:
        if any(literal.negated() in case for literal in case):
            continue
        kept.add(frozenset(a for a in case if not any(b != a and _implies(b, a) for b in case)))
    if len(kept) > MAX_CASES:
        raise UnreadableError("too many cases")
    single = {next(iter(case)) for case in kept if len(case) == 1}
    shorter = {frozenset(a for a in case if len(case) == 1 or a.negated() not in single) for case in kept}
    return Predicate(frozenset(case for case in shorter if not any(other < case for other in shorter)))


def _implies(a: Literal, b: Literal) -> bool:
    """Whether a function at most 0 is larger than another by a size, which is at least 0."""
    if not isinstance(a, AtMostZero) or not isinstance(b, AtMostZero):
        return False
    difference = a.of.plus(b.of, -1)
    return not difference.steps and is_natural(difference.const)


def equivalent(a: Predicate, b: Predicate) -> bool:
    """Whether two conditions agree under every assignment of their literals that is not a contradiction."""
    pairs = {frozenset({literal, literal.negated()}) for truth in (a, b) for case in truth.cases for literal in case}
    if len(pairs) > MAX_LITERALS:
        return False
    return all(
        any(case <= chosen for case in a.cases) == any(case <= chosen for case in b.cases)
        for chosen in map(frozenset, itertools.product(*pairs))
        if not any(_implies(x, y.negated()) for x in chosen for y in chosen)
    )


def is_natural(size: int | Dim) -> bool:
    """Whether a size is at least 0 for all values of its symbols."""
    return all(c >= 0 for _, c in size.terms) if isinstance(size, Dim) else size >= 0


@dataclass(frozen=True, slots=True)
class Cases:
    """A float tensor: a value where each condition holds; the conditions exclude one another and leave nothing out.

    A value is `factor * element + offset`, with no element for a plain number.
    """

    values: tuple[tuple[Predicate, InputElement | None, float, float], ...]


SymbolicTensor = Affine | Predicate | InputElement | Cases | tuple[Affine, ...]


def shifted(symbolic: SymbolicTensor, axes: Mapping[int, int]) -> SymbolicTensor:
    """The tensor with its indices renumbered."""
    return composed(symbolic, {old: affine(0, {new: 1}) for old, new in axes.items()})


def composed(symbolic: SymbolicTensor, indices: Mapping[int, Affine]) -> SymbolicTensor:
    """The tensor at indices that are functions of other indices."""
    try:
        if isinstance(symbolic, Cases):
            return Cases(tuple((t.at(indices), e and e.at(indices), f, o) for t, e, f, o in symbolic.values))
        if isinstance(symbolic, tuple):
            return tuple(part.at(indices) for part in symbolic)
        return symbolic.at(indices)
    except KeyError:
        raise UnreadableError("an index along an axis of size 1") from None


def combined(a: Cases, b: Cases, function: Callable[..., tuple[InputElement | None, float, float]]) -> Cases:
    """A function of two float tensors, case by case."""
    values = []
    for x, *left in a.values:
        for y, *right in b.values:
            both = x.and_(y)
            if both != NEVER:
                values.append((both, *function(*left, *right)))
    return Cases(tuple(values))


def as_predicate(cases: Cases, function: Callable[[InputElement | None, float, float], Predicate]) -> Predicate:
    """A condition on a float tensor, case by case."""
    out = NEVER
    for where, element, factor, offset in cases.values:
        out = out.or_(where.and_(function(element, factor, offset)))
    return out


def is_zero(element: InputElement | None, factor: float, offset: float) -> Predicate:
    """Where factor * element + offset is 0; elements are integers of fewer than 63 bits."""
    if element is None or factor == 0:
        return ALWAYS if offset == 0 else NEVER
    if offset == 0:
        return Predicate(frozenset({frozenset({InputElement(element.tensor, element.index, zero=True)})}))
    if math.isfinite(offset) and abs(offset / factor) > 1 << 63:
        return NEVER
    raise UnreadableError("an element compared with another number than 0")
