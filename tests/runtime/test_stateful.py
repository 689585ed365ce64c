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
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.select import get_backend
from stepping import NOTHING, model, run, sdpa

NODES = [sdpa(0, sink_length=2), sdpa(1, residual_length=3, block_tokens=3, k_bits=8), sdpa(2, k_bits=32, v_bits=32)]
HEADS, SIZE = 2, 4
CLOSE = 0.3
"""Below the distance of two tokens, 1; above the error of a block that was decoded and sealed again a few times, 0.04
each time (half a step of 8 bits over the 20 numbers there are)."""


def tensor(rows: list[list[int]]) -> np.ndarray:
    """(B, Hkv, N, D): token n is n plus a little ramp over the channels."""
    numbers = np.array(rows, np.float32).reshape(len(rows), 1, -1, 1)
    return np.broadcast_to(numbers, (len(rows), HEADS, numbers.shape[2], SIZE)) + np.arange(SIZE, dtype=np.float32) / 8


class CacheLife(RuleBasedStateMachine):
    """Caches by handle beside their models."""

    name: str
    most_sealed = 0

    def __init__(self) -> None:
        super().__init__()
        self.models: dict[int, list[list[int]]] = {}
        self.next_token = 0

    @property
    def backend(self) -> Backend:
        return get_backend(self.name)

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.models)))

    def length(self, handle: int) -> int:
        return len(self.models[handle][0])

    def attend(self, ticket: int, node: int, key: np.ndarray, mask: np.ndarray = NOTHING) -> None:
        self.backend.attend(ticket, NODES[node], key, key, key, mask, NOTHING)

    @precondition(lambda self: len(self.models) < 4)
    @rule()
    def new(self) -> None:
        handle = self.backend.new_cache()
        run(self.backend, handle, NODES, tensor([[0], [0]]), tensor([[0], [0]]))
        self.backend.reset(handle)
        self.models[handle] = [[], []]

    @precondition(lambda self: self.models)
    @rule(data=st.data(), count=st.integers(1, 9), rewind=st.booleans())
    def run(self, data: st.DataObject, count: int, rewind: bool) -> None:
        handle = self.pick(data)
        keep = data.draw(st.integers(0, self.length(handle))) if rewind else self.length(handle)
        new = range(self.next_token % 8, self.next_token % 8 + count)
        rows = [[*row[:keep], *(n + b for n in new)] for b, row in enumerate(self.models[handle])]
        self.next_token += count
        past, ticket = self.backend.open_step(handle, keep if rewind else -1, model(len(NODES)))
        assert past == keep
        for node in data.draw(st.permutations(range(len(NODES)))):
            self.attend(ticket, node, tensor([row[keep:] for row in rows]))
        self.models[handle] = rows

    @precondition(lambda self: self.models)
    @rule(data=st.data(), done=st.integers(0, len(NODES) - 1), how=st.sampled_from(["mask", "abandon", "run", "crop"]))
    def fail(self, data: st.DataObject, done: int, how: str) -> None:
        handle = self.pick(data)
        key = tensor([[12, 13, 14, 15, 16]] * len(self.models[handle]))
        _, ticket = self.backend.open_step(handle, -1, model(len(NODES)))
        for node in range(done):
            self.attend(ticket, node, key)
        if how == "run":
            self.backend.open_step(handle, -1, model(len(NODES)))
        elif how == "crop":
            self.backend.crop(handle, self.length(handle))
        if how != "abandon":
            with pytest.raises(CacheError):
                self.attend(ticket, done, key, np.zeros((1, 1, 1, 1000 if how == "mask" else 1), np.float32))

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        length = data.draw(st.integers(0, self.length(handle)))
        self.backend.crop(handle, length)
        self.models[handle] = [row[:length] for row in self.models[handle]]

    @precondition(lambda self: 0 < len(self.models) < 4)
    @rule(data=st.data(), copy=st.booleans())
    def fork(self, data: st.DataObject, copy: bool) -> None:
        handle = self.pick(data)
        state = self.backend.export_state(handle)
        other = self.backend.import_state(state) if copy else self.backend.fork(handle)
        self.models[other] = self.models[handle]

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        handle = self.pick(data)
        if self.length(handle):
            index = data.draw(st.lists(st.integers(0, len(self.models[handle]) - 1), min_size=1, max_size=3))
            self.backend.reorder(handle, index)
            self.models[handle] = [self.models[handle][i] for i in index]

    @precondition(lambda self: self.models)
    @rule(data=st.data(), close=st.booleans())
    def reset_or_close(self, data: st.DataObject, close: bool) -> None:
        handle = self.pick(data)
        if close:
            self.backend.close(handle)
            del self.models[handle]
        else:
            self.backend.reset(handle)
            self.models[handle] = [[] for _ in self.models[handle]]

    @invariant()
    def holds_what_the_model_says(self) -> None:
        for handle, rows in self.models.items():
            state = self.backend.export_state(handle)
            assert state.length == self.backend.length(handle) == len(rows[0])
            type(self).most_sealed = max(self.most_sealed, self.backend.sealed_tokens(handle))
            for slot in state.slots if rows[0] else ():
                assert len(slot.rows) == len(rows)
                for row, numbers in zip(slot.rows, rows, strict=True):
                    for side in oracle.decoded(slot.attributes, row):
                        np.testing.assert_allclose(side, tensor([numbers])[0], rtol=0, atol=CLOSE)

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
