"""One cache of the NumPy backend, and the step that is open on it: tickets, commit, rollback, poison, supersede.

A step works on immutable rows: it collects new ones beside the committed ones, which are replaced all at once when
the last of the model's nodes has run. So a rollback is to forget the step, and costs nothing to prepare.
Nothing here locks; the store does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ...errors import CacheError
from ...spec import COMMITTED_LENGTH, SdpaAttributes, StepAttributes
from ..backend import CacheState, RowState, SlotState, make_ticket
from .rows import crop, row_length

ROW_OPTIONS = ("kind", "k_bits", "v_bits", "block_tokens", "v_group_size", "residual_length", "sink_length")


@dataclass(slots=True)
class Step:
    """What the nodes of one run have appended so far; `error` says why one of them failed.

    It is text: an exception would hold its traceback, that the caller's frames, and these the cache, for ever.
    """

    ticket: int
    past_length: int
    attributes: StepAttributes
    pending: dict[int, SlotState] = field(default_factory=dict)
    new_tokens: int | None = None
    nodes_done: int = 0
    error: str | None = None


@dataclass(slots=True)
class NumpyCache:
    """Committed state of one handle, and its open step."""

    handle: int
    state: CacheState
    step: Step | None = None
    sequence: int = 0

    def open_step(self, past_length: int, attributes: StepAttributes) -> Step:
        """Crop to past_length, and open a step there. Raises CacheError."""
        bound = self.state.step
        if bound is not None and bound != attributes:
            raise CacheError(
                f"cache {self.handle}: expected model {bound.model_id} ({bound.layers} nodes), to which it belongs, "
                f"got {attributes.model_id} ({attributes.layers} nodes); use a new cache for each model"
            )
        self._check_nodes()
        length = self.state.length if past_length == COMMITTED_LENGTH else past_length
        if not 0 <= length <= self.state.length:
            raise CacheError(
                f"cache {self.handle}: past_length: expected {COMMITTED_LENGTH} or 0 to {self.state.length}, the "
                f"tokens it holds, got {past_length}"
            )
        self.crop(length)
        self.state = replace(self.state, step=attributes)
        self.step = Step(make_ticket(self.handle, self.sequence), length, attributes)
        return self.step

    def current_step(self, ticket: int) -> Step:
        """The open step, if `ticket` is its ticket and no node of it failed. Raises CacheError."""
        step = self.step
        if step is not None and step.ticket == ticket:
            if step.error is None:
                return step
            raise CacheError(f"cache {self.handle}: an earlier node of this step failed: {step.error}")
        if step is None and ticket == make_ticket(self.handle, self.sequence) and self.state.step is not None:
            raise CacheError(
                f"cache {self.handle}: expected {self.state.step.layers} nodes to take this step's ticket, got one "
                "more; rewrite the original model again"
            )
        raise CacheError(
            f"cache {self.handle}: expected the ticket of its open step, got a stale one: another run on this handle "
            "started, or the cache was changed, during this run; give each of the runs its own cache"
        )

    def slot(self, step: Step, attributes: SdpaAttributes) -> SlotState:
        """The slot as it stands within the step. Raises CacheError if it was made with other options."""
        slots = {s.attributes.slot: s for s in self.state.slots} | step.pending
        slot = slots.get(attributes.slot) or SlotState(attributes, ())
        for name in ROW_OPTIONS:
            expected, got = getattr(slot.attributes, name), getattr(attributes, name)
            if expected != got:
                raise CacheError(
                    f"slot {attributes.slot} of cache {self.handle}: {name}: expected {expected}, with which it was "
                    f"made, got {got}; use a new cache"
                )
        return slot

    def append(self, step: Step, slot: SlotState, new_tokens: int) -> None:
        """Note that a node has run, and the slot that it leaves. The last node commits. Raises CacheError."""
        index = slot.attributes.slot
        if new_tokens:
            if slot.attributes.kind == "self":
                if index in step.pending:
                    raise CacheError(
                        f"slot {index} of cache {self.handle}: expected new tokens once per step, got them twice"
                    )
                if step.new_tokens not in (None, new_tokens):
                    raise CacheError(
                        f"slot {index} of cache {self.handle}: expected {step.new_tokens} new tokens, as the step's "
                        f"other slots, got {new_tokens}"
                    )
                step.new_tokens = new_tokens
            step.pending[index] = slot
        step.nodes_done += 1
        if step.nodes_done == step.attributes.layers:
            self._commit(step)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of the slots that grow, and end the open step. Raises CacheError."""
        if not 0 <= length <= self.state.length:
            raise CacheError(
                f"cache {self.handle}: crop: expected a length of 0 to {self.state.length}, the tokens it holds, "
                f"got {length}"
            )

        def cropped(slot: SlotState) -> tuple[RowState, ...]:
            if slot.attributes.kind == "cross":
                return slot.rows
            return tuple(crop(row, slot.attributes, length) for row in slot.rows) if length else ()

        self.end_step()
        if length < self.state.length:
            self._replace_rows(cropped)
            self.state = replace(self.state, length=length)

    def reset(self) -> None:
        """Drop all tokens and end the open step."""
        self.end_step()
        self._replace_rows(lambda _: ())
        self.state = replace(self.state, length=0)

    def reorder(self, index: list[int]) -> None:
        """Row i becomes the old row index[i], and the open step ends. Raises CacheError."""
        rows = max((len(slot.rows) for slot in self.state.slots), default=0)
        if not index or not all(0 <= i < rows for i in index):
            raise CacheError(
                f"cache {self.handle}: reorder: expected one or more row numbers from 0 to {rows - 1}, got {index}"
                if rows
                else f"cache {self.handle}: reorder: expected a cache that holds tokens, got an empty one"
            )
        self.end_step()
        self._replace_rows(lambda slot: tuple(slot.rows[i] for i in index) if slot.rows else ())

    def end_step(self) -> None:
        """Make the ticket of an open step stale, and drop what it appended."""
        self.step = None
        self.sequence += 1

    def _replace_rows(self, rows_of: Callable[[SlotState], tuple[RowState, ...]]) -> None:
        self.state = replace(
            self.state, slots=tuple(SlotState(slot.attributes, rows_of(slot)) for slot in self.state.slots)
        )

    def _check_nodes(self) -> None:
        """Raise CacheError, once, if the last step was left with nodes missing, and all of them have never run.

        A model that says more nodes than it has would otherwise run on, and forget every step. Whether such a run ended
        or was stopped can't be seen here; where a step has committed before, it was stopped.
        """
        step = self.step
        if self.state.slots or step is None or step.error is not None or step.nodes_done == 0:
            return
        self.end_step()
        raise CacheError(
            f"cache {self.handle}: expected the last run to end, but {step.nodes_done} of {step.attributes.layers} "
            "nodes ran; if it was stopped, run again, else rewrite the original model again"
        )

    def _commit(self, step: Step) -> None:
        length = step.past_length + (step.new_tokens or 0)
        slots: Mapping[int, SlotState] = {s.attributes.slot: s for s in self.state.slots} | step.pending
        for index, slot in slots.items():
            held = {row_length(row, slot.attributes.block_tokens) for row in slot.rows}
            if slot.attributes.kind == "self" and held - {length}:
                raise CacheError(
                    f"slot {index} of cache {self.handle}: expected {length} tokens at the end of the step, "
                    f"got {max(held)}"
                )
        batches = sorted({len(slot.rows) for slot in slots.values() if slot.rows})
        if len(batches) > 1:
            raise CacheError(f"cache {self.handle}: expected as many rows in each slot, got {batches}")
        self.state = replace(self.state, length=length, slots=tuple(slots[i] for i in sorted(slots)))
        self.step = None
