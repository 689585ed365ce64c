"""What a step may be opened on: which caches together, and which lengths of their rows."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import CacheError
from ...spec import ALL_NEW, DEFAULT_HANDLE, StepAttributes
from .caches import NumpyCache

OLD_STEP = "it was rewritten by version 1 of the op, which knows one length; rewrite the original again"


def check_rows(handles: Sequence[int]) -> None:
    """Raise CacheError unless these handles may be the rows of one step."""
    if not handles:
        raise CacheError("cache_handle: expected at least one cache, got none")
    for row, handle in enumerate(handles):
        if handle in handles[:row]:
            raise CacheError(
                f"row {row}: cache {handle}: expected a cache of its own for each row, got that of row "
                f"{list(handles).index(handle)} again; fork it"
            )
        if handle == DEFAULT_HANDLE and len(handles) > 1:
            raise CacheError(f"row {row}: cache_handle: expected a cache, got {DEFAULT_HANDLE}, the default one")


def check_lengths(
    caches: Sequence[NumpyCache], past_lengths: Sequence[int], new_lengths: Sequence[int], step: StepAttributes
) -> tuple[int, ...]:
    """P of each row; zeros for empty caches. Raises CacheError, naming the row where there are several caches."""
    past: list[int] = []
    if len(caches) > 1 and len(past_lengths) not in (1, len(caches)):
        raise CacheError(f"past_length: expected 1 number or {len(caches)}, one for each row, got {len(past_lengths)}")
    for row, cache in enumerate(caches):
        own = past_lengths if len(caches) == 1 or len(past_lengths) == 1 else past_lengths[row : row + 1]
        try:
            past += _kept(cache, own, len(caches) > 1, step)
        except CacheError as error:
            if len(caches) == 1:
                raise
            raise CacheError(f"row {row}: {error}") from None
    _check_new(past, new_lengths, known=len(caches) > 1 or bool(caches[0].state.lengths))
    if len({*past}) > 1 or {*new_lengths} != {ALL_NEW}:
        reason = OLD_STEP if step.spec_version == 1 else step.one_length
        if reason:
            raise CacheError(
                f"rows of {min(past)} to {max(past)} tokens: expected rows of one length that all take all new "
                f"tokens, as this model needs: {reason}"
            )
    return tuple(past)


def _kept(cache: NumpyCache, past_lengths: Sequence[int], among_others: bool, step: StepAttributes) -> tuple[int, ...]:
    rows = len(cache.state.lengths)
    if among_others and rows > 1:
        cache.refuse(f"expected a cache of one row beside others, got one of {rows} rows; split it")
    cache.check_model(step)
    cache.check_nodes()
    return cache.kept(past_lengths)


def _check_new(past: Sequence[int], new_lengths: Sequence[int], *, known: bool) -> None:
    if len(new_lengths) != 1 and known and len(new_lengths) != len(past):
        raise CacheError(f"new_length: expected 1 number or {len(past)}, one for each row, got {len(new_lengths)}")
    for row, new in enumerate(new_lengths):
        if new != ALL_NEW and new < 1:
            raise CacheError(f"row {row}: new_length: expected {ALL_NEW} or at least 1, got {new}")
