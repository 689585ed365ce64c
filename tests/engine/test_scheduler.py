"""The scheduler by itself: whatever comes and goes, its rules hold."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnx_kivi.engine.scheduler import EQUAL, RAGGED, SINGLE, Scheduler, chunk_end

CHUNK = 8


@dataclass(eq=False)
class Fake:
    """A row that only counts."""

    prompt: int
    left: int
    length: int = 0
    turn: int = 0
    waited: int = 0

    @property
    def is_prefilling(self) -> bool:
        return self.length < self.prompt


ARRIVALS = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(1, 40), st.integers(1, 20)), st.just("cancel")), max_size=60
)


@pytest.mark.parametrize("mode", [RAGGED, EQUAL, SINGLE])
@given(arrivals=ARRIVALS, most=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_every_row_is_stepped_in_its_turn(mode: str, arrivals: list[tuple[int, int] | str | None], most: int) -> None:
    scheduler: Scheduler[Fake] = Scheduler(most, mode)
    ended = 0
    for arrival in [*arrivals, *[None] * 2000]:
        if isinstance(arrival, tuple) and scheduler.has_room:
            scheduler.running.append(Fake(*arrival))
        elif arrival == "cancel" and scheduler.running:
            scheduler.running.pop()
        ended += play(scheduler, mode, most)
    assert not scheduler.running
    assert scheduler.next_step() is None


def play(scheduler: Scheduler[Fake], mode: str, most: int) -> int:
    """One step, held to the rules; gives how many rows ended."""
    step = scheduler.next_step()
    if step is None:
        assert not scheduler.running
        return 0
    assert 1 <= len(step.rows) <= most
    assert all(row in scheduler.running and row.is_prefilling == step.is_prefill for row in step.rows)
    if step.is_prefill:
        (row,) = step.rows
        assert row is next(each for each in scheduler.running if each.is_prefilling)
        end = chunk_end(row.length, row.prompt, CHUNK)
        assert row.length < end <= row.prompt
        assert end % CHUNK == 0 or end == row.prompt
        row.length = end
    else:
        assert mode != SINGLE or len(step.rows) == 1
        assert mode != EQUAL or len({row.length for row in step.rows}) == 1
        assert mode != RAGGED or all(row in step.rows or row.is_prefilling for row in scheduler.running)
        for row in step.rows:
            row.length += 1
            row.left -= 1
    for row in scheduler.running:
        counts = not row.is_prefilling and not (step.is_prefill and mode == EQUAL)
        row.waited = 0 if row in step.rows else row.waited + counts
        assert row.waited <= 2 * most
    done = [row for row in step.rows if not row.left]
    scheduler.running[:] = [row for row in scheduler.running if row not in done]
    return len(done)
