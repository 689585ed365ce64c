"""The step that is open on one cache or several: what its nodes have appended, commit, poison, supersede.

A step works on immutable rows: it begins with those that past_length keeps, and collects new ones beside them; the
committed ones are replaced all at once when the last of the model's nodes has run. So a rollback is to forget the step,
and costs nothing to prepare. A step covers all rows of its caches, in order; it is stale as soon as any of them has
gone on without it.
Nothing here locks; the store does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NoReturn

from ...errors import CacheError
from ...spec import ALL_NEW, SELF, SdpaAttributes, StepAttributes
from ..backend import CacheState, RowState, SlotState
from .caches import ROW_OPTIONS, NumpyCache
from .rows import free, row_length


@dataclass(slots=True, eq=False, weakref_slot=True)
class Step:
    """What the nodes of one run have appended so far, over the rows of `caches`; `error` once one of them failed.

    bases: what each cache holds for this step, cut to past_length. rows: None where nobody knows how many an empty
    cache will have. past: tokens of each row, (0,) for an empty cache. new: of each row, or one number for all; -1 =
    all that a node is given. padded: the most new tokens, as the nodes get them.

    The error is text: an exception would hold its traceback, that the caller's frames, and these the cache, for ever.
    """

    ticket: int
    caches: tuple[NumpyCache, ...]
    bases: tuple[CacheState, ...]
    attributes: StepAttributes
    rows: int | None
    past: tuple[int, ...]
    new: tuple[int, ...]
    pending: dict[int, SlotState] = field(default_factory=dict)
    windows: dict[int, set[int]] = field(default_factory=dict)
    padded: int | None = None
    nodes_done: int = 0
    error: str | None = None

    def past_of(self, row: int) -> int:
        """Tokens of a row before the step."""
        return self.past[row] if len(self.past) > 1 else self.past[0]

    def new_of(self, row: int, given: int) -> int:
        """New tokens of a row, of those that a node is `given`."""
        new = self.new[row] if len(self.new) > 1 else self.new[0]
        return given if new == ALL_NEW else new

    def held(self, attributes: SdpaAttributes) -> tuple[RowState | None, ...]:
        """The slot's rows as they stand within the step, None for one that holds nothing; () if none does.

        Raises CacheError if the slot was made with other options.
        """
        if attributes.slot in self.pending:
            self._check_options(self.caches[0], self.pending[attributes.slot].attributes, attributes)
            return self.pending[attributes.slot].rows
        rows: list[RowState | None] = []
        for cache, base in zip(self.caches, self.bases, strict=True):
            slot = next((s for s in base.slots if s.attributes.slot == attributes.slot), None)
            if slot is not None:
                self._check_options(cache, slot.attributes, attributes)
                self._check_sizes(cache, rows, slot)
            rows += slot.rows if slot is not None and slot.rows else [None] * max(len(base.lengths), 1)
        return tuple(rows) if any(row is not None for row in rows) else ()

    def note(self, attributes: SdpaAttributes, rows: tuple[RowState, ...], new_tokens: int) -> None:
        """Note that a node has run, and what it leaves in its slot. The last node commits. Raises CacheError."""
        index = attributes.slot
        self.windows.setdefault(index, set()).add(attributes.window if attributes.evict else 0)
        if new_tokens:
            if attributes.kind == SELF:
                if index in self.pending:
                    self._refuse_slot(index, "expected new tokens once per step, got them twice")
                if self.padded not in (None, new_tokens):
                    self._refuse_slot(
                        index, f"expected {self.padded} new tokens, as the step's other slots, got {new_tokens}"
                    )
                self.padded = new_tokens
            first = next((s for s in self.bases[0].slots if s.attributes.slot == index), None)
            self.pending[index] = SlotState(attributes if first is None else first.attributes, rows)
        self.nodes_done += 1
        if self.nodes_done == self.attributes.layers:
            self._commit()

    def _commit(self) -> None:
        batch = {len(slot.rows) for slot in self.pending.values()} | ({self.rows} if self.rows else set())
        if len(batch) > 1:
            self.caches[0].refuse(f"expected as many rows in each slot, got {sorted(batch)}")
        count = next(iter(batch), 0)
        lengths = tuple(self.past_of(b) + self.new_of(b, self.padded or 0) for b in range(count))
        if self.padded is None:
            lengths = tuple(map(self.past_of, range(count)))
        states = [self._committed(base, lengths, n) for n, base in enumerate(self.bases)]
        for cache, state in zip(self.caches, states, strict=True):
            cache.state, cache.step = state, None

    def _committed(self, base: CacheState, lengths: tuple[int, ...], place: int) -> CacheState:
        """What the cache at `place` holds once the step is done. Raises CacheError."""
        own = slice(place, place + 1) if len(self.caches) > 1 else slice(None)
        pending = {i: SlotState(slot.attributes, slot.rows[own]) for i, slot in self.pending.items()}
        slots = {s.attributes.slot: s for s in base.slots} | pending
        for index, slot in slots.items():
            if slot.attributes.kind == SELF:
                held = tuple(row_length(row, slot.attributes.block_tokens) for row in slot.rows)
                for tokens, length in zip(held or (0,) * len(lengths[own]), lengths[own], strict=True):
                    if tokens != length:
                        self._refuse_slot(index, f"expected {length} tokens at the end of the step, got {tokens}")
        kept = tuple(self._freed(slots[i]) for i in sorted(slots))
        return replace(base, step=self.attributes, lengths=lengths[own], slots=kept)

    def _freed(self, slot: SlotState) -> SlotState:
        """The slot without what no node will see again, if all its nodes have one window, and evict."""
        evicts = slot.attributes.evict and self.windows.get(slot.attributes.slot) == {slot.attributes.window}
        if not evicts:
            return slot
        return replace(slot, rows=tuple(free(row, slot.attributes) for row in slot.rows))

    def _check_options(self, cache: NumpyCache, made: SdpaAttributes, asked: SdpaAttributes) -> None:
        for name in ROW_OPTIONS:
            expected, got = getattr(made, name), getattr(asked, name)
            if expected != got:
                raise CacheError(
                    f"slot {asked.slot} of cache {cache.handle}: {name}: expected {expected}, with which it was made, "
                    f"got {got}; use a new cache"
                )

    def _check_sizes(self, cache: NumpyCache, before: list[RowState | None], slot: SlotState) -> None:
        first = next((_sizes(row) for row in before if row is not None), None)
        got = next((_sizes(row) for row in slot.rows), first)
        if first not in (None, got):
            raise CacheError(
                f"slot {slot.attributes.slot} of cache {cache.handle}: expected heads and head sizes {first}, as the "
                f"rows before, got {got}"
            )

    def _refuse_slot(self, slot: int, what: str) -> NoReturn:
        raise CacheError(f"slot {slot} of cache {self.caches[0].handle}: {what}")


def _sizes(row: RowState) -> str:
    return "{}, {} and {}".format(row.kv_heads, *row.head_sizes)
