"""NumPy backend: every cache of the process that the reference math serves, by handle.

Contract: `backend.Backend`. The locks of a step's caches are held to look and to write, never while computing: rows are
immutable, so a run computes on what it saw, and writes only if its ticket is still the open step's.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NoReturn
from weakref import WeakValueDictionary

import numpy as np

from ...arrays import FloatArray
from ...errors import CacheError
from ...spec import ALL_NEW, DEFAULT_HANDLE, DENSE_BITS, SdpaAttributes, StepAttributes
from ..backend import CacheState, RowState, make_ticket, ticket_handle
from ..state import check_state
from .caches import EMPTY, NumpyCache, settled, single_ticket
from .gather import gathered
from .node import TENSORS, attend_node
from .opening import check_lengths, check_rows
from .rows import pieces, quantized_tokens, row_length
from .steps import Step


class NumpyBackend:
    """Implements Backend with the reference math."""

    name = "numpy"

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._handles = itertools.count(1, 2)
        self._caches: dict[int, tuple[threading.RLock, NumpyCache]] = {}
        self._default_handles: dict[str, int] = {}
        self._wide_steps: WeakValueDictionary[int, Step] = WeakValueDictionary()

    def new_cache(self) -> int:
        """Handle of a new, empty cache."""
        return self._add(EMPTY)

    def close(self, handle: int) -> None:
        """Free a cache."""
        with self._open(handle) as (cache,), self._lock:
            cache.end_step()
            del self._caches[handle]

    def open_step(self, handle: int, past_length: int, step: StepAttributes) -> tuple[int, int]:
        """(P, ticket) of a new step, which supersedes one that is open."""
        past, ticket = self.open_rows([handle], [past_length], [ALL_NEW], step)
        return max(past), ticket

    def open_rows(
        self, handles: Sequence[int], past_lengths: Sequence[int], new_lengths: Sequence[int], step: StepAttributes
    ) -> tuple[tuple[int, ...], int]:
        """(P of each row, ticket) of a new step over the rows of these caches."""
        check_rows(handles)
        if list(handles) == [DEFAULT_HANDLE]:
            handles = [self._default(step.model_id)]
        with self._open(*handles) as caches:
            past = check_lengths(caches, past_lengths, new_lengths, step)
            places = [slice(None)] if len(caches) == 1 else [slice(row, row + 1) for row in range(len(caches))]
            bases = tuple(
                cache.cropped(past[place] if cache.state.lengths else ())
                for cache, place in zip(caches, places, strict=True)
            )
            for cache in caches:
                cache.end_step()
            alone = len(caches) == 1 and not bases[0].lengths
            past = (0,) if alone else past
            rows = None if alone else len(past)
            opened = Step(self._ticket(caches), caches, bases, step, rows, past, tuple(new_lengths))
            if len(caches) > 1:
                self._wide_steps[ticket_handle(opened.ticket)] = opened
            for cache in caches:
                cache.step = opened
        return past, opened.ticket

    def attend(
        self,
        ticket: int,
        attributes: SdpaAttributes,
        query: FloatArray,
        key: FloatArray,
        value: FloatArray,
        attn_mask: FloatArray,
        head_sink: FloatArray,
    ) -> FloatArray:
        """One node: attend, append, seal; the last of a step commits it."""
        step = self._step(ticket)
        try:
            with self._current(step):
                held = step.held(attributes)
            inputs = dict(zip((t.name for t in TENSORS), (query, key, value, attn_mask, head_sink), strict=True))
            output, rows = attend_node(step, attributes, held, inputs)
            with self._current(step):
                step.note(attributes, rows, key.shape[2])
        except BaseException as error:
            step.error = step.error or str(error) or type(error).__name__
            step.pending.clear()
            raise
        return output

    def members(self, ticket: int) -> tuple[int, ...]:
        """Handles of the caches whose rows the step covers."""
        handle = ticket_handle(ticket)
        if handle in self._caches:
            return (handle,)
        step = self._wide_steps.get(handle)
        return () if step is None else tuple(cache.handle for cache in step.caches)

    def length(self, handle: int) -> int:
        """The most committed tokens of any row."""
        return self.export_state(handle).length

    def lengths(self, handle: int) -> tuple[int, ...]:
        """Committed tokens of each row."""
        return self.export_state(handle).lengths

    def sealed_tokens(self, handle: int) -> int:
        """Committed tokens in quantized form, the least over rows and slots that quantize."""
        quantizing = [
            slot
            for slot in self.export_state(handle).slots
            if min(slot.attributes.k_bits, slot.attributes.v_bits) < DENSE_BITS
        ]
        return min((min((quantized_tokens(r, s.attributes) for r in s.rows), default=0) for s in quantizing), default=0)

    def nbytes(self, handle: int) -> int:
        """Bytes of all committed arrays."""
        return sum(size for row in _rows(self.export_state(handle)) for _, size in pieces(row))

    def shared_nbytes(self, handle: int) -> int:
        """Bytes that another row or cache holds too."""
        with self._lock:
            states = [cache.state for _, cache in self._caches.values()]
        holders = Counter(id(piece) for state in states for row in _rows(state) for piece, _ in pieces(row))
        own = (piece for row in _rows(self.export_state(handle)) for piece in pieces(row))
        return sum(size for piece, size in own if holders[id(piece)] > 1)

    def dense_nbytes(self, handle: int) -> int:
        """Bytes of the same tokens as f32."""
        floats = 0
        for slot in self.export_state(handle).slots:
            for row in slot.rows:
                floats += row_length(row, slot.attributes.block_tokens) * row.kv_heads * sum(row.head_sizes)
        return floats * np.dtype(np.float32).itemsize

    def crop(self, handle: int, length: int) -> None:
        """Keep the first `length` tokens of each row."""
        with self._open(handle) as (cache,):
            cache.crop_all(length)

    def crop_rows(self, handle: int, lengths: Sequence[int]) -> None:
        """Keep the first lengths[b] tokens of row b."""
        with self._open(handle) as (cache,):
            cache.crop(lengths)

    def reset(self, handle: int) -> None:
        """Drop all tokens."""
        with self._open(handle) as (cache,):
            cache.reset()

    def fork(self, handle: int) -> int:
        """Handle of a copy."""
        return self._add(self.export_state(handle))

    def gather(self, rows: Sequence[tuple[int, int]]) -> int:
        """Handle of a new cache made of rows of others."""
        with self._open(*dict.fromkeys(handle for handle, _ in rows)) as caches:
            return self._add(gathered({cache.handle: cache for cache in caches}, rows))

    def reorder(self, handle: int, index: Sequence[int]) -> None:
        """Row i becomes the old row index[i]."""
        with self._open(handle) as (cache,):
            state = settled(cache.select(index))
            cache.end_step()
            cache.state = state

    def export_state(self, handle: int) -> CacheState:
        """The committed state itself: its arrays must not be written to."""
        with self._open(handle) as (cache,):
            return cache.state

    def import_state(self, state: CacheState) -> int:
        """Handle of a new cache that holds `state` and shares its arrays."""
        check_state(state)
        return self._add(state)

    def _add(self, state: CacheState) -> int:
        with self._lock:
            handle = next(self._handles)
            self._caches[handle] = threading.RLock(), NumpyCache(handle, state)
        return handle

    def _default(self, model_id: str) -> int:
        with self._lock:
            if model_id not in self._default_handles:
                self._default_handles[model_id] = self.new_cache()
            return self._default_handles[model_id]

    def _ticket(self, caches: Sequence[NumpyCache]) -> int:
        """A step of one cache is named by its handle, one of several by a handle of its own."""
        if len(caches) == 1:
            return single_ticket(caches[0])
        with self._lock:
            return make_ticket(next(self._handles), 0)

    def _step(self, ticket: int) -> Step:
        """The open step of this ticket, of which no node has failed. Raises CacheError."""
        handle = ticket_handle(ticket)
        step = self._wide_steps.get(handle)
        if step is None:
            with self._open(handle) as (cache,):
                step = _own_step(cache, ticket)
        with self._current(step):
            return step

    @contextmanager
    def _current(self, step: Step) -> Iterator[None]:
        """The step's caches, locked, while it is the open one of all of them and has not failed."""
        with self._open(*(cache.handle for cache in step.caches)):
            for cache in step.caches:
                if cache.step is not step:
                    _refuse_stale(cache)
            if step.error is not None:
                step.caches[0].refuse(f"an earlier node of this step failed: {step.error}")
            yield

    @contextmanager
    def _open(self, *handles: int) -> Iterator[tuple[NumpyCache, ...]]:
        """The caches, locked, always in the same order, so that two runs can't wait for each other."""
        with ExitStack() as stack:
            for handle in sorted(handles):
                known = self._caches.get(handle)
                if known is not None:
                    stack.enter_context(known[0])
                if known is None or handle not in self._caches:
                    row = f"row {handles.index(handle)}: " if len(handles) > 1 else ""
                    raise CacheError(
                        f"{row}cache {handle}: expected an open handle, got one that is closed or was never given out"
                    )
            yield tuple(self._caches[handle][1] for handle in handles)


def _own_step(cache: NumpyCache, ticket: int) -> Step:
    """The step that is open on this cache alone, if this is its ticket. Raises CacheError."""
    if cache.step is None and ticket == single_ticket(cache) and cache.state.step is not None:
        cache.refuse(
            f"expected {cache.state.step.layers} nodes to take this step's ticket, got one more; rewrite the original "
            "model again"
        )
    if cache.step is None or cache.step.ticket != ticket:
        _refuse_stale(cache)
    return cache.step


def _rows(state: CacheState) -> Iterator[RowState]:
    return (row for slot in state.slots for row in slot.rows)


def _refuse_stale(cache: NumpyCache) -> NoReturn:
    cache.refuse(
        "expected the ticket of its open step, got a stale one: another run on this handle started, or the cache was "
        "changed, during this run; give each of the runs its own cache"
    )
