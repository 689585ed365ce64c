"""A cache made of rows of other caches: fork, select, repeat and join are all this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import CacheError
from ..backend import CacheState, SlotState
from .caches import ROW_OPTIONS, NumpyCache, settled


def gathered(caches: Mapping[int, NumpyCache], rows: Sequence[tuple[int, int]]) -> CacheState:
    """The state whose row i is row `rows[i][1]` of cache `rows[i][0]`, sharing its pieces. Raises CacheError."""
    if not rows:
        raise CacheError("gather: expected at least one row, got none")
    parts = [_row(caches[handle], row) for handle, row in rows]
    first = parts[0]
    for (handle, _), part in zip(rows, parts, strict=True):
        _check_alike(caches[rows[0][0]], first, caches[handle], part)
    slots = (
        SlotState(slots[0].attributes, tuple(row for slot in slots for row in slot.rows))
        for slots in zip(*(part.slots for part in parts), strict=True)
    )
    return settled(CacheState(first.step, tuple(part.lengths[0] for part in parts), tuple(slots)))


def _row(cache: NumpyCache, row: int) -> CacheState:
    count = len(cache.state.lengths)
    if not 0 <= row < count:
        cache.refuse(
            f"expected a row number from 0 to {count - 1}, got {row}"
            if count
            else "expected a cache that holds tokens, got an empty one"
        )
    return cache.select([row])


def _check_alike(first_cache: NumpyCache, first: CacheState, cache: NumpyCache, part: CacheState) -> None:
    if part.step is not None:
        first_cache.check_model(part.step)
    ours, theirs = ([_likeness(slot) for slot in state.slots] for state in (first, part))
    if ours != theirs:
        cache.refuse(
            f"expected slots of the same options, heads and sizes as cache {first_cache.handle}, got others; only "
            "caches of one model can be joined"
        )


def _likeness(slot: SlotState) -> tuple[object, ...]:
    options = tuple(getattr(slot.attributes, name) for name in ROW_OPTIONS)
    return (slot.attributes.slot, options, *((row.kv_heads, row.head_sizes) for row in slot.rows))
