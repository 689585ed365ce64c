"""How long work says where it is: a callable that takes what is being done (nothing: all done) and how far (0 to 1)."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float], None]


def silent(what: str, fraction: float) -> None:
    """Progress that nobody watches."""
