"""NumPy backend: every cache of the process that the reference math serves, by handle.

Contract: `backend.Backend`. A cache's lock is held to look and to write, never while computing: rows are immutable,
so a run computes on what it saw, and writes only if its ticket is still the open step's.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from ...arrays import FloatArray
from ...errors import CacheError
from ...spec import DEFAULT_HANDLE, DENSE_BITS, QUANTIZED_KV_SDPA, SdpaAttributes, StepAttributes, check_shapes
from ..backend import CacheState, SlotState, ticket_handle
from ..state import check_state
from .reference import attend_row
from .rows import append, empty_row, quantized_tokens, row_length, row_nbytes
from .steps import NumpyCache

EMPTY = CacheState(None, 0, ())
TENSORS = tuple(t for t in QUANTIZED_KV_SDPA.inputs if t.element == "float")


class NumpyBackend:
    """Implements Backend with the reference math."""

    name = "numpy"

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._handles = itertools.count(1, 2)
        self._caches: dict[int, tuple[threading.RLock, NumpyCache]] = {}
        self._default_handles: dict[str, int] = {}

    def new_cache(self) -> int:
        """Handle of a new, empty cache."""
        return self.import_state(EMPTY)

    def close(self, handle: int) -> None:
        """Free a cache."""
        with self._open(handle) as cache, self._lock:
            cache.end_step()
            del self._caches[handle]

    def open_step(self, handle: int, past_length: int, step: StepAttributes) -> tuple[int, int]:
        """(P, ticket) of a new step, which supersedes one that is open."""
        with self._open(self._default(step.model_id) if handle == DEFAULT_HANDLE else handle) as cache:
            opened = cache.open_step(past_length, step)
            return opened.past_length, opened.ticket

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
        handle = ticket_handle(ticket)
        with self._open(handle) as cache:
            step = cache.current_step(ticket)
        try:
            with self._open(handle) as cache:
                cache.current_step(ticket)
                slot = cache.slot(step, attributes)
            inputs = dict(zip((t.name for t in TENSORS), (query, key, value, attn_mask, head_sink), strict=True))
            output, slot = _attend(slot, attributes, step.past_length, inputs)
            with self._open(handle) as cache:
                cache.current_step(ticket)
                cache.append(step, slot, key.shape[2])
        except BaseException as error:
            step.error = step.error or str(error) or type(error).__name__
            step.pending.clear()
            raise
        return output

    def length(self, handle: int) -> int:
        """Committed tokens."""
        return self.export_state(handle).length

    def sealed_tokens(self, handle: int) -> int:
        """Committed tokens in quantized form, the least over the slots that quantize."""
        quantizing = [
            slot
            for slot in self.export_state(handle).slots
            if min(slot.attributes.k_bits, slot.attributes.v_bits) < DENSE_BITS
        ]
        return min((min((quantized_tokens(r, s.attributes) for r in s.rows), default=0) for s in quantizing), default=0)

    def nbytes(self, handle: int) -> int:
        """Bytes of all committed arrays."""
        return sum(row_nbytes(row) for slot in self.export_state(handle).slots for row in slot.rows)

    def dense_nbytes(self, handle: int) -> int:
        """Bytes of the same tokens as f32."""
        floats = 0
        for slot in self.export_state(handle).slots:
            for row in slot.rows:
                heads, _, k_head_size = row.residual_key.shape
                per_token = heads * (k_head_size + row.residual_value.shape[2])
                floats += row_length(row, slot.attributes.block_tokens) * per_token
        return floats * np.dtype(np.float32).itemsize

    def crop(self, handle: int, length: int) -> None:
        """Keep the first `length` tokens."""
        with self._open(handle) as cache:
            cache.crop(length)

    def reset(self, handle: int) -> None:
        """Drop all tokens."""
        with self._open(handle) as cache:
            cache.reset()

    def fork(self, handle: int) -> int:
        """Handle of a copy."""
        return self._add(self.export_state(handle))

    def reorder(self, handle: int, index: list[int]) -> None:
        """Row i becomes the old row index[i]."""
        with self._open(handle) as cache:
            cache.reorder(index)

    def export_state(self, handle: int) -> CacheState:
        """The committed state itself: its arrays must not be written to."""
        with self._open(handle) as cache:
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

    @contextmanager
    def _open(self, handle: int) -> Iterator[NumpyCache]:
        """The cache, locked."""
        known = self._caches.get(handle)
        if known is not None:
            lock, cache = known
            with lock:
                if handle in self._caches:
                    yield cache
                    return
        raise CacheError(f"cache {handle}: expected an open handle, got one that is closed or was never given out")


def _attend(
    slot: SlotState, attributes: SdpaAttributes, position: int, inputs: dict[str, FloatArray]
) -> tuple[FloatArray, SlotState]:
    """(output (B, Hq, S, Dv), the slot with the new tokens) of one node. Raises CacheError."""
    where = f"QuantizedKvSdpa, slot {attributes.slot}"
    for name, array in inputs.items():
        if array.dtype != np.float32:
            raise CacheError(f"{where}: {name}: expected float32, got {array.dtype}")
    query, key, value, attn_mask, head_sink = inputs.values()
    new_tokens = key.shape[2] if key.ndim == 4 else 0
    rows = () if attributes.kind == "cross" and new_tokens else slot.rows
    held = row_length(rows[0], attributes.block_tokens) if rows else 0
    if attributes.kind == "self" and not rows and position:
        raise CacheError(f"{where}: expected {position} tokens, as the step, got an empty slot; use a new cache")
    if attributes.kind == "cross" and not slot.rows and key.ndim == 4 and not new_tokens:
        raise CacheError(f"{where}: expected an encoder's keys and values in the first run, got none; feed them once")
    dims = {"P": held}
    if rows:
        heads, _, k_head_size = rows[0].residual_key.shape
        dims |= {"B": len(rows), "Hkv": heads, "Dk": k_head_size, "Dv": rows[0].residual_value.shape[2]}
    check_shapes(where, TENSORS, {name: array.shape for name, array in inputs.items()}, dims)
    if dims["Hq"] % dims["Hkv"]:
        raise CacheError(
            f"{where}: query: expected a multiple of the {dims['Hkv']} key/value heads, got {dims['Hq']} heads"
        )
    rows = rows or (empty_row(dims["Hkv"], dims["Dk"], dims["Dv"]),) * dims["B"]
    output = np.empty((*query.shape[:3], dims["Dv"]), np.float32)
    for b, row in enumerate(rows):
        mask = attn_mask[b if attn_mask.shape[0] > 1 else 0] if attn_mask.size else None
        sink = head_sink if head_sink.size else None
        output[b] = attend_row(attributes, row, position, query[b], key[b], value[b], mask, sink)
    if new_tokens:
        rows = tuple(append(row, attributes, key[b], value[b]) for b, row in enumerate(rows))
    return output, replace(slot, rows=rows)
