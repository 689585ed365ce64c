"""Turns what a verification has done into progress: sessions opened, and tokens run."""

from __future__ import annotations

from ..progress import Progress

OPENING = 50
"""Opening a session takes about as long as so many tokens."""


class Meter:
    """Says how far work of `total` is, on a scale that ends at 1; work that was not foreseen stays at the end."""

    def __init__(self, progress: Progress, sessions: int, tokens: int) -> None:
        self._progress = progress
        self._total = max(1, sessions * (OPENING + tokens))
        self._done = 0
        self._what = ""

    def begin(self, what: str) -> None:
        """A session is about to be opened for this."""
        self._what = what
        self._say()
        self._done += OPENING

    def tick(self, tokens: int) -> None:
        """So many tokens were run."""
        self._done += tokens
        self._say()

    def _say(self) -> None:
        self._progress(self._what, min(1.0, self._done / self._total))
