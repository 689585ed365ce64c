"""One cache of the NumPy backend: what is committed, how it is cut and reordered, and which step is open on it.

Rows are immutable values (`rows`), so every change is a new state. Nothing here locks; the store does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from ...errors import CacheError
from ...spec import COMMITTED_LENGTH, SELF, StepAttributes
from ..backend import CacheState, SlotState, make_ticket
from .rows import crop, least_crop

if TYPE_CHECKING:
    from .steps import Step

ROW_OPTIONS = (
    "kind",
    "k_bits",
    "v_bits",
    "block_tokens",
    "v_group_size",
    "residual_length",
    "sink_length",
    "k_scheme",
    "v_scheme",
    "dense_element",
)
EMPTY = CacheState(None, (), ())


@dataclass(slots=True, eq=False)
class NumpyCache:
    """Committed state of one handle, and the step that is open on it."""

    handle: int
    state: CacheState = EMPTY
    step: Step | None = None
    sequence: int = 0

    def refuse(self, what: str) -> NoReturn:
        """Raise CacheError about this cache."""
        raise CacheError(f"cache {self.handle}: {what}")

    def check_model(self, attributes: StepAttributes) -> None:
        """Raise CacheError if the cache belongs to another model."""
        bound = self.state.step
        if bound is not None and bound != attributes:
            self.refuse(
                f"expected model {bound.model_id} ({bound.layers} nodes), to which it belongs, got "
                f"{attributes.model_id} ({attributes.layers} nodes); use a new cache for each model"
            )

    def check_nodes(self) -> None:
        """Raise CacheError, once, if the last step was left with nodes missing, and all of them have never run.

        A model that says more nodes than it has would otherwise run on, and forget every step. Whether such a run ended
        or was stopped can't be seen here; where a step has committed before, it was stopped.
        """
        step = self.step
        if self.state.slots or step is None or step.error is not None or step.nodes_done == 0:
            return
        self.end_step()
        self.refuse(
            f"expected the last run to end, but {step.nodes_done} of {step.attributes.layers} nodes ran; if it was "
            "stopped, run again, else rewrite the original model again"
        )

    def kept(self, past_lengths: Sequence[int]) -> tuple[int, ...]:
        """The tokens that each row keeps; zeros for an empty cache. Raises CacheError unless they can be kept."""
        held = self.state.lengths or (0,) * len(past_lengths)
        if len(past_lengths) not in (1, len(held)):
            self.refuse(f"past_length: expected 1 number or {len(held)}, one for each row, got {len(past_lengths)}")
        wanted = tuple(past_lengths) * (len(held) if len(past_lengths) == 1 else 1)
        for length, asked in zip(held, wanted, strict=True):
            if not COMMITTED_LENGTH <= asked <= length:
                self.refuse(
                    f"past_length: expected {COMMITTED_LENGTH} or 0 to {length}, the tokens it holds, got {asked}"
                )
        kept = tuple(n if asked == COMMITTED_LENGTH else asked for n, asked in zip(held, wanted, strict=True))
        self.check_crop("past_length", kept)
        return kept

    def check_crop(self, what: str, lengths: Sequence[int]) -> None:
        """Raise CacheError if a cut to these lengths would have to bring back what a window has freed."""
        for slot in self.state.slots:
            for row, held, length in zip(slot.rows, self.state.lengths, lengths, strict=False):
                least = least_crop(row, slot.attributes) if slot.attributes.kind == SELF else 0
                if 0 < length < min(least, held):
                    self.refuse(
                        f"{what}: expected 0 or at least {least}, as slot {slot.attributes.slot} has freed the tokens "
                        f"that its window of {slot.attributes.window} no longer shows, got {length}; start anew"
                    )

    def crop(self, lengths: Sequence[int]) -> None:
        """Keep the first tokens of each row in the slots that grow, and end the open step. Raises CacheError."""
        state = self.cropped(lengths)
        self.end_step()
        self.state = state

    def cropped(self, lengths: Sequence[int]) -> CacheState:
        """The state of the first lengths[b] tokens of each row. Raises CacheError unless they can be kept."""
        held = self.state.lengths
        if len(lengths) != len(held):
            self.refuse(f"crop: expected {len(held)} lengths, one for each row, got {len(lengths)}")
        for length, asked in zip(held, lengths, strict=True):
            if not 0 <= asked <= length:
                self.refuse(f"crop: expected a length of 0 to {length}, the tokens it holds, got {asked}")
        self.check_crop("crop", lengths)
        if tuple(lengths) == held:
            return self.state
        slots = tuple(self._cropped(slot, lengths) for slot in self.state.slots)
        return settled(replace(self.state, lengths=tuple(lengths), slots=slots))

    def crop_all(self, length: int) -> None:
        """Keep the first `length` tokens of each row; shorter rows keep all. Raises CacheError."""
        if not 0 <= length <= self.state.length:
            self.refuse(f"crop: expected a length of 0 to {self.state.length}, the tokens it holds, got {length}")
        self.crop([min(length, held) for held in self.state.lengths])

    def reset(self) -> None:
        """Drop all tokens and end the open step."""
        self.end_step()
        slots = tuple(SlotState(slot.attributes, ()) for slot in self.state.slots)
        self.state = replace(self.state, lengths=(), slots=slots)

    def select(self, index: Sequence[int]) -> CacheState:
        """The state whose row i is row index[i]. Raises CacheError."""
        rows = len(self.state.lengths)
        if not index or not all(0 <= i < rows for i in index):
            self.refuse(
                f"reorder: expected one or more row numbers from 0 to {rows - 1}, got {list(index)}"
                if rows
                else "reorder: expected a cache that holds tokens, got an empty one"
            )
        slots = tuple(
            SlotState(slot.attributes, tuple(slot.rows[i] for i in index) if slot.rows else ())
            for slot in self.state.slots
        )
        return replace(self.state, lengths=tuple(self.state.lengths[i] for i in index), slots=slots)

    def end_step(self) -> None:
        """Make the ticket of an open step stale, and drop what it appended."""
        self.step = None
        self.sequence += 1

    @staticmethod
    def _cropped(slot: SlotState, lengths: Sequence[int]) -> SlotState:
        if slot.attributes.kind != SELF:
            return slot
        rows = (crop(row, slot.attributes, n) for row, n in zip(slot.rows, lengths, strict=True))
        return SlotState(slot.attributes, tuple(rows))


def settled(state: CacheState) -> CacheState:
    """The state, without rows if none has a token: an empty cache takes any number of them."""
    if any(state.lengths):
        return state
    slots = tuple(SlotState(s.attributes, ()) if s.attributes.kind == SELF else s for s in state.slots)
    return replace(state, lengths=state.lengths if any(slot.rows for slot in slots) else (), slots=slots)


def single_ticket(cache: NumpyCache) -> int:
    """The ticket of the step that is open, or was the last to be, on this cache alone."""
    return make_ticket(cache.handle, cache.sequence)
