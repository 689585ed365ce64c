"""What a backend is: all caches of one process, with the kernel that reads them. NumPy and native are two of these.

Store and kernel are one unit, because the layout of a block in memory is the kernel's own. The semantics of every
method (steps, tickets, order of attend, append and seal) are those of the ops, see `spec`, and are said in full
below; `reference` and `quantize` are normative for the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ..arrays import ByteArray, FloatArray, HalfArray
from ..spec import SdpaAttributes, StepAttributes

NO_HALVES, NO_BYTES = np.zeros(0, np.float16), np.zeros(0, np.uint8)
"""A part that the scheme of a block has not."""


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """Codes of one sealed block and side, in the canonical layout; `parts` has the shapes of all schemes.

    codes are packed along the last axis, lowest bits first, each row padded to a whole byte with zeros: a row is a key
    channel or digit over the tokens, or a value token over the channels. lo and scale are of a key channel, or of a
    value token's group. digits: how many each key channel has, packed likewise. token and unit: the scales of tokens.
    """

    codes: ByteArray
    lo: HalfArray
    scale: HalfArray
    digits: ByteArray = field(default_factory=lambda: NO_BYTES)
    token: ByteArray = field(default_factory=lambda: NO_BYTES)
    unit: HalfArray = field(default_factory=lambda: NO_HALVES)

    @property
    def arrays(self) -> tuple[ByteArray | HalfArray, ...]:
        """All parts, in the order of files; one that the scheme has not is empty."""
        return self.codes, self.lo, self.scale, self.digits, self.token, self.unit


@dataclass(frozen=True, slots=True)
class BlockState:
    """A `sealed` segment: one block; a dense side (32 bits, or not representable) is f32 (Hkv, block_tokens, D)."""

    key: QuantizedBlock | FloatArray
    value: QuantizedBlock | FloatArray


@dataclass(frozen=True, slots=True)
class DenseState:
    """A `sinks` or `dense` segment: keys (Hkv, tokens, Dk) and values (Hkv, tokens, Dv), f32."""

    key: FloatArray
    value: FloatArray

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return int(self.key.shape[1])


@dataclass(frozen=True, slots=True)
class RowState:
    """One row of one slot: the segments of `spec.SEGMENTS`, in their order; `freed` is a number of tokens.

    Sinks and the dense end are there even when they hold nothing, and tell heads and head sizes.
    """

    sinks: DenseState
    freed: int
    blocks: tuple[BlockState, ...]
    residual: DenseState

    @property
    def kv_heads(self) -> int:
        """Hkv."""
        return int(self.residual.key.shape[0])

    @property
    def head_sizes(self) -> tuple[int, int]:
        """(Dk, Dv)."""
        return int(self.residual.key.shape[2]), int(self.residual.value.shape[2])


@dataclass(frozen=True, slots=True)
class SlotState:
    """One slot of a cache: what its node says of it, and its rows; no rows where nothing was ever appended."""

    attributes: SdpaAttributes
    rows: tuple[RowState, ...]


@dataclass(frozen=True, slots=True)
class CacheState:
    """Everything a cache holds, in the canonical layout: what files carry and what backends exchange.

    lengths: the tokens of each row; empty for a cache that holds none.
    """

    step: StepAttributes | None
    lengths: tuple[int, ...]
    slots: tuple[SlotState, ...]

    @property
    def length(self) -> int:
        """The most tokens of any row."""
        return max(self.lengths, default=0)


_SEQUENCE_BITS = 32


def make_ticket(handle: int, sequence: int) -> int:
    """The int64 that names one step of one cache; the sequence number wraps at 32 bits."""
    return handle << _SEQUENCE_BITS | sequence & (1 << _SEQUENCE_BITS) - 1


def ticket_handle(ticket: int) -> int:
    """The handle whose step the ticket names."""
    return ticket >> _SEQUENCE_BITS


def is_native(handle: int) -> bool:
    """Whether the native backend owns the handle: its handles are even, those of NumPy odd."""
    return handle % 2 == 0


class Backend(Protocol):
    """All caches of one backend, by handle (a positive int; 0 is the default cache of each model).

    Handles of the native backend are even, those of NumPy odd, and all are below 2^31; a ticket is
    `make_ticket(handle, sequence)`: so a handle or a ticket alone says whose it is.
    Every method is thread-safe and raises CacheError for a handle that is unknown or closed; only open_step takes 0.
    """

    @property
    def name(self) -> str:
        """`numpy` or `native`."""

    def new_cache(self) -> int:
        """Handle of a new, empty cache."""

    def close(self, handle: int) -> None:
        """Free a cache; closing twice is an error, like any other use of a closed handle."""

    def open_step(self, handle: int, past_length: int, step: StepAttributes) -> tuple[int, int]:
        """`open_rows` of one cache whose rows keep equally many tokens: (the most tokens of any row, ticket)."""

    def open_rows(
        self, handles: Sequence[int], past_lengths: Sequence[int], new_lengths: Sequence[int], step: StepAttributes
    ) -> tuple[tuple[int, ...], int]:
        """Open a step over the rows of these caches, superseding those that are open: (P of each row, ticket).

        handles: one cache, or several that hold one row each, all different. past_lengths, new_lengths: one number for
        all rows or one for each; -1 = the committed length, all new tokens. Of a cache that is empty P is (0,).
        Tokens beyond past_length are dropped, as by `crop`, when the step commits: one that fails drops none.
        Raises CacheError naming the row: closed handle, another model's handle, past_length beyond the cache, rows of
        different lengths where the model's one_length says why not; then no cache has changed. And once, after a step
        of which some nodes ran, none failed and some never ran, where no step of the cache has committed yet: the
        model may have fewer nodes than it says. (The native host counts the nodes it serves, and so it knows better.)
        """

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
        """Attend, append, seal: the whole op. Shapes as in the spec; the output is (B, Hq, S, Dv).

        Row b's new tokens and queries are the last new_length of S (the output of the others is 0), and of a mask with
        columns for the longest row and S it takes the last P + new_length. The last of the step's `layers` calls
        commits it for all rows. An error poisons the step: later calls raise too and touch nothing, and the next step
        of any of its caches starts from the committed length. Raises CacheError.

        A `self` slot takes new tokens once per step, the same number in every slot; a call without new tokens (layers
        that share a cache) sees what the slot holds by now, so T counts the tokens that an earlier call of this step
        gave it; its queries still stand at P. A `cross` slot keeps what it was filled with: its P is its own length;
        new tokens replace what it holds, and are then all that is seen.
        """

    def members(self, ticket: int) -> tuple[int, ...]:
        """Handles of the caches whose rows the step covers; () for a ticket that is not known any more."""

    def length(self, handle: int) -> int:
        """The most committed tokens of any row."""

    def lengths(self, handle: int) -> tuple[int, ...]:
        """Committed tokens of each row; () for a cache that holds none."""

    def sealed_tokens(self, handle: int) -> int:
        """Committed tokens held in quantized form: the least over rows and slots that quantize (0 if none does)."""

    def nbytes(self, handle: int) -> int:
        """Bytes held: codes, parameters, dense blocks, sinks and residual of all slots; shared blocks count in full."""

    def shared_nbytes(self, handle: int) -> int:
        """Of `nbytes`, the bytes that another cache, or another row of this one, holds too."""

    def dense_nbytes(self, handle: int) -> int:
        """Bytes that the same tokens take as f32 keys and values, freed ones left out."""

    def crop(self, handle: int, length: int) -> None:
        """Keep the first `length` tokens of each row, of shorter rows all; else as `crop_rows`."""

    def crop_rows(self, handle: int, lengths: Sequence[int]) -> None:
        """Keep the first lengths[b] tokens of row b.

        Exact inside the residual; tokens of a cut sealed block keep their error. A row that a window has freed tokens
        of can be cut only to where all that its window shows is still held, or to 0. Like reset and reorder it ends an
        open step: what that appended is dropped, and its ticket is stale.
        """

    def reset(self, handle: int) -> None:
        """Drop all tokens, those of cross slots too; the handle stays bound to its model."""

    def gather(self, rows: Sequence[tuple[int, int]]) -> int:
        """Handle of a new cache whose row i is a copy of row rows[i] = (handle, row): fork, select, repeat and join.

        Copies share sealed blocks. Raises CacheError for a row that isn't there, or for caches of different models,
        slots or shapes.
        """

    def fork(self, handle: int) -> int:
        """Handle of a copy that shares the sealed blocks, also of an empty cache."""

    def reorder(self, handle: int, index: Sequence[int]) -> None:
        """Row i becomes the old row index[i] (beam search); the number of rows may change."""

    def export_state(self, handle: int) -> CacheState:
        """Canonical copy of a cache."""

    def import_state(self, state: CacheState) -> int:
        """Handle of a new cache that holds `state`. Raises CacheError if it contradicts itself."""
