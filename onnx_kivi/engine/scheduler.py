"""Which requests run, and what the next step is: values in, a decision out; nothing is run here.

Prompts are fed one row and one chunk at a time, so that a row's cache is the same whoever its neighbours are. Between
two chunks every row that generates gets a token; but where only rows of equal length run together all prompts come
first, as rows that begin to generate at different times would never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ..run.stepper import chunk_ends

RAGGED, EQUAL, SINGLE = "ragged", "equal lengths", "one by one"
"""Rows of which lengths a model takes in one run."""


class Steppable(Protocol):
    """What the scheduler reads of a row, and the turn that it writes."""

    length: int
    turn: int

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of its prompt are still to be fed."""


ARow = TypeVar("ARow", bound=Steppable)


@dataclass(frozen=True, slots=True)
class Step(Generic[ARow]):
    """A chunk of one row's prompt, or a token for each of some rows."""

    rows: tuple[ARow, ...]
    is_prefill: bool


class Scheduler(Generic[ARow]):
    """The rows that run, in the order of their admission, at most max_batch. mode: RAGGED, EQUAL or SINGLE."""

    def __init__(self, max_batch: int, mode: str) -> None:
        self.running: list[ARow] = []
        self._max_batch = max_batch
        self._mode = mode
        self._turn = 0
        self._prefilled = False

    @property
    def has_room(self) -> bool:
        """Whether one more may run."""
        return len(self.running) < self._max_batch

    def next_step(self) -> Step[ARow] | None:
        """What to run now: chunks of prompts and tokens take turns. None if nothing runs."""
        prompts = [row for row in self.running if row.is_prefilling]
        others = [row for row in self.running if not row.is_prefilling]
        takes_turns = self._prefilled and bool(others) and self._mode != EQUAL
        self._prefilled = bool(prompts) and not takes_turns
        rows = prompts[:1] if self._prefilled else self._together(others)
        self._turn += 1
        for row in rows:
            row.turn = self._turn
        return Step(tuple(rows), self._prefilled) if rows else None

    def _together(self, rows: Sequence[ARow]) -> Sequence[ARow]:
        """Rows that the model takes in one run, among them the one that has waited longest."""
        if not rows or self._mode == RAGGED:
            return rows
        first = min(rows, key=lambda row: row.turn)
        return [row for row in rows if row is first or (self._mode == EQUAL and row.length == first.length)]


def chunk_end(length: int, prompt: int, chunk: int) -> int:
    """Where the next chunk of a prompt ends, `length` tokens of which are held."""
    return length + chunk_ends(length, prompt - length, chunk)[0]
