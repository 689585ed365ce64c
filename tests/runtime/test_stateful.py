"""Random lives of a cache, on every backend: whatever is done, it holds the tokens that a plain list of them says.

The model of a cache is, per row, the list of token numbers it was given; keys and values are a function of the number,
so that what is decoded shows which tokens are there, and in which order, despite quantization.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import oracle
from onnx_kivi.errors import BackendUnavailableError, CacheError
from onnx_kivi.runtime.backend import Backend, RowState
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import SdpaAttributes, StepAttributes
from stepping import NOTHING, sdpa

NODES = [
    sdpa(0, sink_length=2),
    sdpa(1, residual_length=3, block_tokens=3, k_bits=8, window=12, evict=1, spec_version=2),
    sdpa(2, k_bits=32, v_bits=32),
]
MODEL = StepAttributes(model_id="model", layers=len(NODES), spec_version=2)
HEADS, SIZE = 2, 4
CLOSE = 0.3
"""Below the distance of two tokens, 1; above the error of a block that was decoded and sealed again a few times, 0.04
each time (half a step of 8 bits over the 20 numbers there are)."""


def tensor(rows: list[list[int]]) -> np.ndarray:
    """(B, Hkv, N, D): token n is n plus a little ramp over the channels."""
    numbers = np.array(rows, np.float32).reshape(len(rows), 1, -1, 1)
    return np.broadcast_to(numbers, (len(rows), HEADS, numbers.shape[2], SIZE)) + np.arange(SIZE, dtype=np.float32) / 8


def right_aligned(rows: list[list[int]]) -> np.ndarray:
    """The tensor of rows of different lengths, padded on the left with a token that nobody may read."""
    width = max(map(len, rows))
    return tensor([[10**6] * (width - len(row)) + row for row in rows])


class CacheLife(RuleBasedStateMachine):
    """Caches by handle beside their models: the tokens of each row; no rows in a cache that holds none."""

    name: str
    most_sealed = most_freed = most_ragged = 0

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[int, list[list[int]]] = {}
        self.next_token = 0

    @property
    def backend(self) -> Backend:
        return get_backend(self.name)

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.models)))

    def keep(self, handle: int, rows: list[list[int]]) -> None:
        self.models[handle] = rows if any(rows) else []

    def fresh(self, count: int) -> list[int]:
        first = self.next_token % 8
        self.next_token += count
        return list(range(first, first + count))

    def attend(self, ticket: int, node: int, key: np.ndarray, mask: np.ndarray = NOTHING) -> None:
        self.backend.attend(ticket, NODES[node], key, key, key, mask, NOTHING)

    @precondition(lambda self: len(self.models) < 5)
    @rule()
    def new(self) -> None:
        handle = self.backend.new_cache()
        _, ticket = self.backend.open_step(handle, -1, MODEL)
        for node in range(len(NODES)):
            self.attend(ticket, node, tensor([[0]]))
        self.backend.reset(handle)
        self.models[handle] = []

    @precondition(lambda self: self.models)
    @rule(data=st.data(), rewind=st.booleans())
    def run(self, data: st.DataObject, rewind: bool) -> None:
        """Over one cache, or several of one row, each row with new tokens of its own."""
        handles = [self.pick(data)]
        others = [h for h, rows in self.models.items() if h != handles[0] and len(rows) < 2]
        if len(self.models[handles[0]]) < 2 and others:
            handles += data.draw(st.lists(st.sampled_from(others), max_size=2, unique=True))
        batch = data.draw(st.integers(1, 2)) if len(handles) == 1 else 1
        held = [row for handle in handles for row in self.models[handle] or [[]] * batch]
        new = [self.fresh(data.draw(st.integers(1, 9))) for _ in held]
        keep = [data.draw(st.integers(0, len(row))) if rewind else len(row) for row in held]
        try:
            past, ticket = self.backend.open_rows(handles, keep if rewind else [-1], list(map(len, new)), MODEL)
        except CacheError as error:
            if not rewind or "has freed the tokens" not in str(error):
                raise
            return
        assert past == tuple(keep) if any(keep) else not any(past)
        for node in data.draw(st.permutations(range(len(NODES)))):
            self.attend(ticket, node, right_aligned(new))
        rows = [row[:n] + more for row, n, more in zip(held, keep, new, strict=True)]
        for i, handle in enumerate(handles):
            self.keep(handle, rows if len(handles) == 1 else rows[i : i + 1])
        type(self).most_ragged = max(self.most_ragged, len(handles))

    @precondition(lambda self: self.models)
    @rule(data=st.data(), done=st.integers(0, len(NODES) - 1), how=st.sampled_from(["mask", "abandon", "run", "crop"]))
    def fail(self, data: st.DataObject, done: int, how: str) -> None:
        """Every handle of the step is left as it was, and so is what past_length would have dropped."""
        handle = self.pick(data)
        handles = [handle, *(h for h in self.models if h != handle and len(self.models[h]) == 1)][:2]
        handles = handles if len(self.models[handle]) == 1 else handles[:1]
        key = tensor([[12, 13, 14, 15, 16]] * (len(handles) if len(handles) > 1 else len(self.models[handle]) or 1))
        past = data.draw(st.sampled_from([-1, 0]))
        _, ticket = self.backend.open_rows(handles, [past], [-1], MODEL)
        for node in range(done):
            self.attend(ticket, node, key)
        if how == "run":
            self.backend.open_step(handle, -1, MODEL)
        elif how == "crop":
            self.backend.crop(handle, self.backend.length(handle))
        if how != "abandon":
            with pytest.raises(CacheError):
                self.attend(ticket, done, key, np.zeros((1, 1, 1, 1000 if how == "mask" else 1), np.float32))

    @precondition(lambda self: self.models)
    @rule(data=st.data(), apart=st.booleans())
    def crop(self, data: st.DataObject, apart: bool) -> None:
        handle = self.pick(data)
        rows = self.models[handle]
        least = data.draw(st.integers(0, max(map(len, rows), default=0)))
        lengths = [data.draw(st.integers(0, len(row))) if apart else min(least, len(row)) for row in rows]
        try:
            if apart:
                self.backend.crop_rows(handle, lengths)
            else:
                self.backend.crop(handle, least)
        except CacheError as error:
            if "has freed the tokens" not in str(error):
                raise
            assert any(n < len(row) for n, row in zip(lengths, rows, strict=True))
        else:
            self.keep(handle, [row[:n] for row, n in zip(rows, lengths, strict=True)])

    @precondition(lambda self: 0 < len(self.models) < 5)
    @rule(data=st.data(), copy=st.booleans())
    def fork(self, data: st.DataObject, copy: bool) -> None:
        handle = self.pick(data)
        state = self.backend.export_state(handle)
        other = self.backend.import_state(state) if copy else self.backend.fork(handle)
        self.models[other] = self.models[handle]

    @precondition(lambda self: any(self.models.values()) and len(self.models) < 5)
    @rule(data=st.data())
    def gather(self, data: st.DataObject) -> None:
        """Select, repeat, join and split are all this."""
        rows = [(handle, row) for handle, rows in self.models.items() for row in range(len(rows))]
        chosen = data.draw(st.lists(st.sampled_from(rows), min_size=1, max_size=3))
        self.keep(self.backend.gather(chosen), [self.models[handle][row] for handle, row in chosen])

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        if self.models[handle]:
            index = data.draw(st.lists(st.integers(0, len(self.models[handle]) - 1), min_size=1, max_size=3))
            self.backend.reorder(handle, index)
            self.keep(handle, [self.models[handle][i] for i in index])

    @precondition(lambda self: self.models)
    @rule(data=st.data(), close=st.booleans())
    def reset_or_close(self, data: st.DataObject, close: bool) -> None:
        handle = self.pick(data)
        if close:
            self.backend.close(handle)
            del self.models[handle]
        else:
            self.backend.reset(handle)
            self.models[handle] = []

    @invariant()
    def holds_what_the_model_says(self) -> None:
        for handle, rows in self.models.items():
            state = self.backend.export_state(handle)
            lengths = self.backend.lengths(handle)
            assert state.lengths == lengths
            assert lengths == tuple(map(len, rows)) if any(rows) else not any(lengths)
            type(self).most_sealed = max(self.most_sealed, self.backend.sealed_tokens(handle))
            for slot in state.slots if any(rows) else ():
                assert len(slot.rows) == len(rows)
                for row, numbers in zip(slot.rows, rows, strict=True):
                    self.holds(slot.attributes, row, numbers)

    def holds(self, attributes: SdpaAttributes, row: RowState, numbers: list[int]) -> None:
        """All but what is freed, which no query to come sees."""
        begin, end = row.sinks.tokens, row.sinks.tokens + row.freed
        type(self).most_freed = max(self.most_freed, row.freed)
        assert not row.freed or end <= len(numbers) - attributes.window + 1
        wanted = tensor([numbers])[0].copy()
        wanted[:, begin:end] = np.nan
        for side in oracle.decoded(attributes, row):
            np.testing.assert_allclose(side, wanted, rtol=0, atol=CLOSE)

    def teardown(self) -> None:
        for handle in self.models:
            self.backend.close(handle)


@pytest.mark.parametrize("name", ["numpy", "native"])
def test_any_life_of_a_cache_keeps_its_tokens(name: str) -> None:
    try:
        get_backend(name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))

    class Life(CacheLife):
        pass

    Life.name = name
    case: Any = Life.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
    case("runTest").runTest()
    assert Life.most_sealed > 0
