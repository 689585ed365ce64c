"""What is known of one tensor, and how rules take it apart; the ground that the rules of `shapes` stand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from ..view import Node
from .dims import Dim

Values = npt.NDArray[Any]
Sizes = tuple[int | Dim, ...]


class UnknownError(Exception):
    """The rule can't tell."""


@dataclass(frozen=True, slots=True)
class AbstractValue:
    """Element type (0 = unknown), sizes (None = rank unknown) and value, if small and known."""

    element: int
    shape: Sizes | None
    value: Values | None = None

    def numbers(self) -> list[Any] | None:
        """The value as nested lists, if it is known and made of plain numbers."""
        if self.value is None or any(isinstance(x, Dim) for x in self.value.flat):
            return None
        return self.value.tolist()  # type: ignore[no-any-return]


def ints(known: AbstractValue | None) -> list[int]:
    """The elements of a tensor of integers."""
    if known is None or known.value is None or not all(isinstance(x, int) for x in known.value.flat):
        raise UnknownError
    return [int(x) for x in known.value.flat]


def value_of(known: AbstractValue) -> Values:
    """The value of a tensor."""
    if known.value is None:
        raise UnknownError
    return known.value


def shape_of(known: AbstractValue | None) -> Sizes:
    """The sizes of a tensor."""
    if known is None or known.shape is None:
        raise UnknownError
    return known.shape


def axes_of(node: Node, inputs: Sequence[AbstractValue | None]) -> list[int] | None:
    """The axes of an Unsqueeze, Squeeze or reduction, from input 1 or the attribute; None if it names none."""
    if node.input(1):
        return ints(inputs[1])
    axes = node.attr("axes")
    return None if axes is None else list(axes)


def slices(node: Node, inputs: Sequence[AbstractValue | None], rank: int) -> list[tuple[int, int | Dim, int | Dim]]:
    """(axis, start, end) of each part of a Slice, of either spelling, over a tensor of this rank; steps of 1 only."""
    if len(inputs) > 1:
        starts, ends = (list(value_of(known).flat) if known else [] for known in inputs[1:3])
        axes = ints(inputs[3]) if node.input(3) else list(range(len(starts)))
        steps = ints(inputs[4]) if node.input(4) else [1] * len(starts)
    else:
        starts, ends = list(node.attr("starts", ())), list(node.attr("ends", ()))
        axes, steps = list(node.attr("axes", range(len(starts)))), [1] * len(starts)
    if any(step != 1 for step in steps) or any(not -rank <= axis < rank for axis in axes):
        raise UnknownError
    if not len(starts) == len(ends) == len(axes):
        raise UnknownError
    return [(axis % rank, start, end) for axis, start, end in zip(axes, starts, ends, strict=True)]
