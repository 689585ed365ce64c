"""How a tensor lies, as text: "BHSD", "(BH)SD".

A layout has a letter per axis: B batch, H heads, S new tokens, D head size, T all tokens; K and G are kv heads and
query heads per kv head, where H is split so; 1 is an axis of size 1, and so is what has no letter. Axes in parentheses
are merged into one, the first letter varying slowest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

HEADS_FIRST = "BHSD"
SCORES = "BHST"
SIZE_1 = "1"


def letters(layout: str) -> tuple[str, ...]:
    """The letters of each axis: "(BH)SD" gives BH, S, D."""
    return tuple(merged or single for merged, single in re.findall(r"\((\w+)\)|(\w)", layout))


def joined(axes: Iterable[str]) -> str:
    """The layout that has these letters on its axes."""
    return "".join(axis if len(axis) == 1 else f"({axis})" for axis in axes)
