"""Symbolic sizes: polynomials with integer coefficients over named symbols, exact or unknown, never approximate.

A size that is a plain number is a Python int; anything else is a `Dim`. Operators mix the two, so numpy object
arrays of sizes compute as arrays of integers would. Two equal values always compare equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Monomial = tuple[str, ...]

MAX_TERMS = 64
MAX_DEGREE = 12


class TooComplexError(ValueError):
    """A size grew beyond what any real model computes."""


@dataclass(frozen=True, slots=True)
class Dim:
    """A non-constant polynomial: sorted (monomial, coefficient) pairs, coefficients never 0."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: object) -> int | Dim:
        return NotImplemented if not isinstance(other, (int, Dim)) else _sum((*_terms(self), *_terms(other)))

    def __mul__(self, other: object) -> int | Dim:
        if not isinstance(other, (int, Dim)):
            return NotImplemented
        return _sum((tuple(sorted((*m, *n))), a * b) for m, a in _terms(self) for n, b in _terms(other))

    def __neg__(self) -> int | Dim:
        return self * -1

    def __sub__(self, other: object) -> int | Dim:
        return NotImplemented if not isinstance(other, (int, Dim)) else self + -other

    def __rsub__(self, other: int) -> int | Dim:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __str__(self) -> str:
        return " + ".join("*".join((*((str(c),) if c != 1 or not m else ()), *m)) for m, c in self.terms)

    @property
    def name(self) -> str | None:
        """The name of a polynomial that is one bare symbol, else None."""
        (monomial, coefficient), *rest = self.terms
        return monomial[0] if not rest and coefficient == 1 and len(monomial) == 1 else None

    def factors(self) -> list[list[int | Dim]]:
        """The polynomial as a sum of products of numbers and bare symbols."""
        return [
            [*([c] if c != 1 or not monomial else []), *(symbol(name) for name in monomial)]
            for monomial, c in self.terms
        ]

    @property
    def symbols(self) -> frozenset[str]:
        """Names of the symbols it depends on."""
        return frozenset(name for monomial, _ in self.terms for name in monomial)


def symbol(name: str) -> Dim:
    """The polynomial `name`."""
    return Dim((((name,), 1),))


def divide(a: int | Dim, b: int | Dim) -> int | Dim | None:
    """a / b when it is exact for every value of the symbols, else None."""
    remainder, quotient = dict(_terms(a)), 0  # type: tuple[dict[Monomial, int], int | Dim]
    divisor = _terms(b)
    if not divisor:
        return None
    lead, coefficient = divisor[-1]
    while remainder:
        monomial = max(remainder, key=_order)
        rest = _without(monomial, lead)
        if rest is None or remainder[monomial] % coefficient:
            return None
        step = _sum(((rest, remainder[monomial] // coefficient),))
        quotient = quotient + step
        remainder = dict(_terms(_sum((*remainder.items(), *_terms(step * b * -1)))))
    return quotient


def substitute(size: int | Dim, values: Mapping[str, int | Dim]) -> int | Dim:
    """`size` with symbols replaced."""
    if isinstance(size, int) or not size.symbols & values.keys():
        return size
    return evaluate(size, lambda name: values.get(name, symbol(name)))


def evaluate(size: int | Dim, value: Callable[[str], int | Dim]) -> int | Dim:
    """`size` with every symbol replaced by what `value` says."""
    total: int | Dim = 0
    for monomial, coefficient in _terms(size):
        term: int | Dim = coefficient
        for name in monomial:
            term = value(name) * term
        total = total + term
    return total


def _order(monomial: Monomial) -> tuple[int, Monomial]:
    return len(monomial), monomial


def _terms(size: int | Dim) -> tuple[tuple[Monomial, int], ...]:
    if isinstance(size, Dim):
        return size.terms
    return (((), int(size)),) if size else ()


def _sum(terms: Iterable[tuple[Monomial, int]]) -> int | Dim:
    total: dict[Monomial, int] = {}
    for monomial, coefficient in terms:
        total[monomial] = total.get(monomial, 0) + coefficient
    kept = sorted(((m, c) for m, c in total.items() if c), key=lambda term: _order(term[0]))
    if len(kept) > MAX_TERMS or any(len(m) > MAX_DEGREE or abs(c) >= 1 << 63 for m, c in kept):
        raise TooComplexError("a size in the graph is no polynomial of reasonable degree")
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Dim(tuple(kept))


def _without(monomial: Monomial, part: Monomial) -> Monomial | None:
    rest = list(monomial)
    for name in part:
        if name not in rest:
            return None
        rest.remove(name)
    return tuple(rest)
