"""Equations of Einsum: a label for each axis (ONNX operator specification, Einsum-12)."""

from __future__ import annotations

from collections.abc import Sequence

Labels = tuple[str, ...]


def read_equation(equation: str, ranks: Sequence[int | None]) -> tuple[tuple[Labels, ...], Labels] | None:
    """Labels of each operand's axes and of the result's; None if they don't fit operands of these ranks.

    An ellipsis becomes labels of its own, which count from its last axis, as broadcasting does.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    texts = left.split(",")
    if len(texts) != len(ranks):
        return None
    operands = []
    for text, rank in zip(texts, ranks, strict=True):
        labels = None if rank is None else _labels(text, rank - len(text.replace("...", "")))
        if labels is None or len(labels) != rank:
            return None
        operands.append(labels)
    hidden = max((label for labels in operands for label in labels if len(label) > 1), default="", key=_place)
    if arrow:
        result = _labels(right, _place(hidden))
    else:
        letters = left.replace("...", "").replace(",", "")
        once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        result = _labels(f"...{''.join(once)}", _place(hidden))
    if result is None or not {*result} <= {label for labels in operands for label in labels}:
        return None
    return tuple(operands), result


def _labels(text: str, hidden: int) -> Labels | None:
    """Labels of one term whose ellipsis, if it has one, stands for so many axes."""
    before, dots, after = text.partition("...")
    if not (before + after).isalpha() and before + after:
        return None
    return (*before, *(f"...{i}" for i in range(hidden, 0, -1) if dots), *after)


def _place(label: str) -> int:
    return int(label.removeprefix("...") or 0)
