"""Native backend: the caches and the kernel of libonnx_kivi, and that library as onnxruntime loads it.

Contract: `backend.Backend`; one native call per method. Numbers are those of `reference`, codes bit for bit.
nbytes counts sealed blocks as they are held, padded to whole vectors (no padding where block_tokens, v_group_size,
Dk and Dv are multiples of 16), and dense tokens at what they take. Importing this module raises ImportError where
nothing is compiled.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from .. import _native
from ..arrays import FloatArray
from ..errors import CacheError, ConfigError, KiviError, SpecMismatchError
from ..spec import ALL_NEW, SdpaAttributes, StepAttributes
from .backend import BlockState, CacheState, DenseState, QuantizedBlock, RowState, SlotState

MOST_ATTRIBUTES = 4096


class NativeBackend:
    """Implements Backend in C++. Raises ConfigError if ONNX_KIVI_ISA names a level that can't run here."""

    name = "native"

    def __init__(self) -> None:
        self.isa = _native.isa()
        self._attributes: dict[int, tuple[SdpaAttributes, _native.SdpaAttributes]] = {}

    def new_cache(self) -> int:
        """Handle of a new, empty cache."""
        return _native.new_cache()

    def close(self, handle: int) -> None:
        """Free a cache."""
        _native.close(handle)

    def open_step(self, handle: int, past_length: int, step: StepAttributes) -> tuple[int, int]:
        """(P, ticket) of a new step, which supersedes one that is open."""
        past, ticket = self.open_rows([handle], [past_length], [ALL_NEW], step)
        return max(past), ticket

    def open_rows(
        self, handles: Sequence[int], past_lengths: Sequence[int], new_lengths: Sequence[int], step: StepAttributes
    ) -> tuple[tuple[int, ...], int]:
        """(P of each row, ticket) of a new step over the rows of these caches."""
        attributes = _native.StepAttributes(step.to_wire())
        past, ticket = _native.open_rows(list(handles), list(past_lengths), list(new_lengths), attributes)
        return tuple(past), ticket

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
        output: FloatArray = _native.attend(ticket, self._parsed(attributes), query, key, value, attn_mask, head_sink)
        return output

    def members(self, ticket: int) -> tuple[int, ...]:
        """Handles of the caches whose rows the step covers."""
        return tuple(_native.members(ticket))

    def length(self, handle: int) -> int:
        """The most committed tokens of any row."""
        return _native.length(handle)

    def lengths(self, handle: int) -> tuple[int, ...]:
        """Committed tokens of each row."""
        return tuple(_native.lengths(handle))

    def sealed_tokens(self, handle: int) -> int:
        """Committed tokens in quantized form, the least over the slots that quantize."""
        return _native.sealed_tokens(handle)

    def nbytes(self, handle: int) -> int:
        """Bytes of the committed tokens, as they are held."""
        return _native.nbytes(handle)

    def shared_nbytes(self, handle: int) -> int:
        """Bytes that another row or cache holds too."""
        return _native.shared_nbytes(handle)

    def dense_nbytes(self, handle: int) -> int:
        """Bytes of the same tokens as f32."""
        return _native.dense_nbytes(handle)

    def crop(self, handle: int, length: int) -> None:
        """Keep the first `length` tokens of each row."""
        _native.crop(handle, length)

    def crop_rows(self, handle: int, lengths: Sequence[int]) -> None:
        """Keep the first lengths[b] tokens of row b."""
        _native.crop_rows(handle, list(lengths))

    def reset(self, handle: int) -> None:
        """Drop all tokens."""
        _native.reset(handle)

    def fork(self, handle: int) -> int:
        """Handle of a copy."""
        return _native.fork(handle)

    def gather(self, rows: Sequence[tuple[int, int]]) -> int:
        """Handle of a new cache made of rows of others."""
        return _native.gather(list(rows))

    def reorder(self, handle: int, index: Sequence[int]) -> None:
        """Row i becomes the old row index[i]."""
        _native.reorder(handle, list(index))

    def export_state(self, handle: int) -> CacheState:
        """Canonical copy of a cache."""
        step, lengths, slots = _native.export_state(handle)
        return CacheState(
            None if step is None else StepAttributes.from_wire(step),
            tuple(lengths),
            tuple(SlotState(SdpaAttributes.from_wire(wire), tuple(map(_row_state, rows))) for wire, rows in slots),
        )

    def import_state(self, state: CacheState) -> int:
        """Handle of a new cache that holds a copy of `state`."""
        step = None if state.step is None else _native.StepAttributes(state.step.to_wire())
        slots = [(_native.SdpaAttributes(s.attributes.to_wire()), [_row_tuple(r) for r in s.rows]) for s in state.slots]
        return _native.import_state(step, list(state.lengths), slots)

    def _parsed(self, attributes: SdpaAttributes) -> _native.SdpaAttributes:
        """The native form of `attributes`, kept per object: a node passes the same one at every step."""
        known = self._attributes.get(id(attributes))
        if known is not None and known[0] is attributes:
            return known[1]
        if len(self._attributes) >= MOST_ATTRIBUTES:
            self._attributes.clear()
        parsed = _native.SdpaAttributes(attributes.to_wire())
        self._attributes[id(attributes)] = attributes, parsed
        return parsed


def library_path() -> str:
    """Path of libonnx_kivi, for `SessionOptions.register_custom_ops_library` in any language."""
    return str(Path(_native.__file__).with_name("libonnx_kivi.so"))


def register(options: ort.SessionOptions) -> None:
    """Make sessions that are built with `options` serve the ops natively, without Python.

    On the main thread Ctrl-C ends a run from now on, and not only the wait for it: its tokens are dropped.
    """
    if threading.current_thread() is threading.main_thread():
        _native.watch_interrupts()
    options.register_custom_ops_library(library_path())


def isa() -> str:
    """ISA level that the kernel runs at."""
    return _native.isa()


def error_from(failure: BaseException) -> KiviError | None:
    """The error that a native node refused with, from the exception that onnxruntime made of it; None if not ours."""
    found = re.search(r"onnx_kivi (\w+): (.*)", str(failure), re.DOTALL)
    kinds = (CacheError, ConfigError, SpecMismatchError)
    kind = next((k for k in kinds if found and k.__name__ == found[1]), None)
    return kind(found[2]) if found and kind else None


def isa_levels() -> list[str]:
    """ISA levels that this machine can run, best first; ONNX_KIVI_ISA names one of these."""
    return _native.isa_names()


def thread_count() -> int:
    """Threads that attention uses under the Python host: ONNX_KIVI_THREADS, else the physical cores."""
    return _native.threads()


def _row_state(row: tuple[Any, ...]) -> RowState:
    sinks, freed, blocks, residual = row
    states = tuple(BlockState(_side_state(key), _side_state(value)) for key, value in blocks)
    return RowState(DenseState(*sinks), freed, states, DenseState(*residual))


def _side_state(side: Any) -> QuantizedBlock | FloatArray:
    return QuantizedBlock(*side) if isinstance(side, tuple) else side


def _row_tuple(row: RowState) -> tuple[Any, ...]:
    blocks = [(_side_tuple(block.key), _side_tuple(block.value)) for block in row.blocks]
    return (row.sinks.key, row.sinks.value), row.freed, blocks, (row.residual.key, row.residual.value)


def _side_tuple(side: QuantizedBlock | FloatArray) -> Any:
    return side.arrays if isinstance(side, QuantizedBlock) else side
