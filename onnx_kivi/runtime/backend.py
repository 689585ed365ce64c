"""What a backend is: all caches of one process, with the kernel that reads them. NumPy and native are two of these.

Store and kernel are one unit, because the layout of a block in memory is the kernel's own. The semantics of every
method (steps, tickets, order of attend, append and seal) are those of the ops, see `spec`, and are said in full
below; `reference` and `quantize` are normative for the numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..arrays import ByteArray, FloatArray, HalfArray
from ..spec import SdpaAttributes, StepAttributes


@dataclass(frozen=True, slots=True)
class QuantizedBlock:
    """Codes of one sealed block and side, in the canonical layout.

    Keys: codes (Hkv, Dk, ceil(block_tokens * bits / 8)), lo and scale (Hkv, Dk).
    Values: codes (Hkv, block_tokens, ceil(Dv * bits / 8)), lo and scale (Hkv, block_tokens, groups).
    Codes are packed along the last axis, lowest bits first, each row padded to a whole byte with zeros.
    """

    codes: ByteArray
    lo: HalfArray
    scale: HalfArray


@dataclass(frozen=True, slots=True)
class BlockState:
    """One sealed block of one row; a dense side (32 bits, or not representable) is f32 (Hkv, block_tokens, D)."""

    key: QuantizedBlock | FloatArray
    value: QuantizedBlock | FloatArray


@dataclass(frozen=True, slots=True)
class RowState:
    """One row of one slot: sinks and residual are f32, (Hkv, tokens, D)."""

    sink_key: FloatArray
    sink_value: FloatArray
    blocks: tuple[BlockState, ...]
    residual_key: FloatArray
    residual_value: FloatArray


@dataclass(frozen=True, slots=True)
class SlotState:
    """One slot of a cache: what its node says of it, and its rows."""

    attributes: SdpaAttributes
    rows: tuple[RowState, ...]


@dataclass(frozen=True, slots=True)
class CacheState:
    """Everything a cache holds, in the canonical layout: what files carry and what backends exchange."""

    step: StepAttributes | None
    length: int
    slots: tuple[SlotState, ...]


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
        """Open a step, superseding one that is open: (P, ticket). past_length -1 = the committed length.

        Tokens beyond past_length are dropped at once, as by `crop`: a rollback goes back to P tokens.
        Raises CacheError: closed handle, another model's handle, past_length beyond the cache; and once, after a step
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

        The last of the step's `layers` calls commits it. An error poisons the step: later calls raise too
        and touch nothing, and the next step starts from the committed length. Raises CacheError.

        A `self` slot takes new tokens once per step, the same number in every slot; a call without new tokens (layers
        that share a cache) sees what the slot holds by now, so T counts the tokens that an earlier call of this step
        gave it; its queries still stand at P. A `cross` slot keeps what it was filled with: its P is its own length;
        new tokens replace what it holds, and are then all that is seen.
        """

    def length(self, handle: int) -> int:
        """Committed tokens."""

    def sealed_tokens(self, handle: int) -> int:
        """Committed tokens held in quantized form: the least over the slots that quantize (0 if none does)."""

    def nbytes(self, handle: int) -> int:
        """Bytes held: codes, parameters, dense blocks, sinks and residual of all slots; shared blocks count in full."""

    def dense_nbytes(self, handle: int) -> int:
        """Bytes that the same tokens take as f32 keys and values."""

    def crop(self, handle: int, length: int) -> None:
        """Keep the first `length` tokens. Exact inside the residual; tokens of a cut sealed block keep their error.

        Like reset and reorder it ends an open step: what that appended is dropped, and its ticket is stale.
        """

    def reset(self, handle: int) -> None:
        """Drop all tokens, those of cross slots too; the handle stays bound to its model."""

    def fork(self, handle: int) -> int:
        """Handle of a copy that shares the sealed blocks."""

    def reorder(self, handle: int, index: list[int]) -> None:
        """Row i becomes the old row index[i] (beam search); the number of rows may change."""

    def export_state(self, handle: int) -> CacheState:
        """Canonical copy of a cache."""

    def import_state(self, state: CacheState) -> int:
        """Handle of a new cache that holds `state`. Raises CacheError if it contradicts itself."""
