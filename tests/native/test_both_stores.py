"""The native store does what the NumPy store does: the same operations leave the same caches, bit for bit, and are
refused with the same words."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.cache_file import load_state, save_state
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import CROSS, StepAttributes
from stepping import NOTHING, assert_same, sdpa, tokens

pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)

# What q k^T and p v may differ by: the native kernel rounds each query to 16 bits for its integer products, 2^-15 of
# the largest of some 10 terms of size 1 to 10.
ATTENTION_TOLERANCE = 5e-3

Pair = tuple[int, int]
"""Handles of the same cache in the NumPy store and in the native one."""

K_SIZE, V_SIZE, MOST_CACHES = 5, 7, 5


@dataclass(frozen=True, slots=True)
class Run:
    """One step over some caches, as both stores get it."""

    past_lengths: list[int]
    new_lengths: list[int]
    key: npt.NDArray[np.float32]
    value: npt.NDArray[np.float32]
    query: npt.NDArray[np.float32]
    mask: npt.NDArray[np.float32]
    nodes: int
    fills: bool
    fault: str | None


class BothStores(RuleBasedStateMachine):
    """Drives both backends with the same calls. Two `self` slots, one with a window, and a `cross` slot."""

    seen: set[str] = set()  # noqa: RUF012 - of all examples: what at least one of them reached

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[Pair] = []
        self.backends: tuple[Backend, Backend] = (get_backend("numpy"), get_backend("native"))

    @initialize(
        bits=st.tuples(*[st.sampled_from([2, 4, 8, 32])] * 4),
        block=st.integers(1, 6),
        residual=st.integers(0, 7),
        sinks=st.integers(0, 3),
        group=st.integers(0, 5),
        window=st.sampled_from([0, 4, 9]),
        evict=st.booleans(),
        strict=st.sampled_from(["", "", "", "positions count from P"]),
        seed=st.integers(0, 2**16),
    )
    def configure(
        self,
        bits: tuple[int, ...],
        block: int,
        residual: int,
        sinks: int,
        group: int,
        window: int,
        evict: bool,
        strict: str,
        seed: int,
    ) -> None:
        options: dict[str, Any] = {"block_tokens": block, "residual_length": residual, "sink_length": sinks}
        options |= {"v_group_size": group, "spec_version": 2}
        windows = {"window": window, "evict": int(evict and window > 0), "window_sinks": sinks if window else 0}
        self.nodes = [
            sdpa(0, k_bits=bits[0], v_bits=bits[1], is_causal=1, **options),
            sdpa(1, k_bits=bits[2], v_bits=bits[3], **windows, **options),
            sdpa(2, k_bits=bits[0], v_bits=bits[3], kind=CROSS, **options),
        ]
        self.model = StepAttributes(model_id="model", layers=3, one_length=strict, spec_version=2)
        self.rng = np.random.default_rng(seed)
        self.pairs = [self.new_pair() for _ in "ab"]

    def new_pair(self) -> Pair:
        return self.backends[0].new_cache(), self.backends[1].new_cache()

    def both(self, call: Callable[[Backend, int], Any]) -> list[Any]:
        """Results of `call(backend, 0 or 1)` on both; an error must be the same on both."""
        results: list[Any] = []
        for side, backend in enumerate(self.backends):
            try:
                results.append(call(backend, side))
            except CacheError as error:
                results.append(re.sub(r"cache \d+", "cache _", str(error)))
        if isinstance(results[0], str) or isinstance(results[1], str):
            assert results[0] == results[1], results
            self.seen.add(re.sub(r"\d+", "_", results[0]).split(", got")[0])
        return results

    def keep(self, handles: list[Any]) -> None:
        if not isinstance(handles[0], str):
            self.pairs.append((handles[0], handles[1]))

    def lengths(self, pair: Pair) -> tuple[int, ...]:
        return self.backends[0].lengths(pair[0])

    def pick(self, data: st.DataObject) -> Pair:
        return data.draw(st.sampled_from(self.pairs))

    def some_run(self, data: st.DataObject, pairs: Sequence[Pair]) -> Run:
        lengths = [n for pair in pairs for n in self.lengths(pair) or (0,)]
        rows = len(lengths)
        if len(pairs) == 1 and not self.lengths(pairs[0]):
            rows = data.draw(st.integers(1, 3))
        count = data.draw(st.integers(1, 14))
        cuts = st.tuples(*[st.integers(-1, n) for n in lengths]).map(list)
        past = data.draw(data.draw(st.sampled_from([st.just([-1]), st.just([-1]), cuts, st.just([max(lengths)])])))
        new = data.draw(st.just([-1]) | st.lists(st.integers(1, count), min_size=rows, max_size=rows))
        key = tokens(self.rng, count, batch=rows, size=K_SIZE)
        if data.draw(st.integers(0, 5)) == 0:
            key[0, 0, 0, 0] = data.draw(st.sampled_from([np.nan, 1e9]))
        mask = NOTHING
        if data.draw(st.integers(0, 2)) == 0:
            kept = [n if p == -1 else p for n, p in zip(lengths, past * (rows if len(past) == 1 else 1), strict=False)]
            full = (rows, 2, count, max(kept, default=0) + count)
            shape = [size if data.draw(st.booleans()) else 1 for size in full]
            mask = self.rng.standard_normal(shape).astype(np.float32)
        return Run(
            past,
            new,
            key,
            tokens(self.rng, count, batch=rows, size=V_SIZE),
            tokens(self.rng, count, batch=rows, size=K_SIZE),
            mask,
            nodes=data.draw(st.sampled_from([3] * 8 + [1, 2])),
            fills=data.draw(st.booleans()) or 0 in lengths,
            fault=data.draw(st.sampled_from([None] * 16 + ["heads", "mask", "twice", "more", "other"])),
        )

    def do_run(self, backend: Backend, handles: list[int], run: Run) -> list[Any]:
        new = [n + 20 for n in run.new_lengths] if run.fault == "more" else run.new_lengths
        _, ticket = backend.open_rows(handles, run.past_lengths, new, self.model)
        outputs = []
        for i, node in enumerate(self.nodes[: run.nodes]):
            k, v, mask = run.key, run.value, run.mask if node.kind != CROSS else NOTHING
            if node.kind == CROSS and not run.fills:
                k, v = k[:, :, :0], v[:, :, :0]
            if i == run.nodes - 1 and run.fault == "heads":
                k = k[:, :1]
            if i == 1 and run.fault == "mask":
                mask = np.zeros((1, 1, 1, 10**4), np.float32)
            if i == 1 and run.fault == "other":
                backend.crop(handles[0], backend.length(handles[0]))
            served = self.nodes[0] if run.fault == "twice" and i == 1 else node
            outputs.append(backend.attend(ticket, served, run.query, k, v, mask, NOTHING))
        return outputs

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        pairs = data.draw(st.lists(st.sampled_from(self.pairs), min_size=1, max_size=3, unique=True))
        if data.draw(st.integers(0, 20)) == 20:
            pairs.append(pairs[0])
        run = self.some_run(data, pairs)
        results = self.both(lambda backend, side: self.do_run(backend, [pair[side] for pair in pairs], run))
        if isinstance(results[0], str) or np.isnan(run.key).any() or np.abs(run.key).max() > 1e6:
            return
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ATTENTION_TOLERANCE)
        if run.nodes == 3:
            self.seen.add(f"a run over {min(len(pairs), 2)} caches")

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        pair = self.pick(data)
        length = data.draw(st.integers(-1, max(self.lengths(pair), default=0) + 1))
        self.both(lambda backend, side: backend.crop(pair[side], length))

    @rule(data=st.data())
    def crop_rows(self, data: st.DataObject) -> None:
        pair = self.pick(data)
        lengths = data.draw(st.tuples(*[st.integers(0, n) for n in self.lengths(pair)]))
        wrong = data.draw(st.sampled_from([(), (), (), (0,), (-1,)]))
        self.both(lambda backend, side: backend.crop_rows(pair[side], [*lengths, *wrong]))

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        pair = self.pick(data)
        if data.draw(st.integers(0, 3)) == 0:
            self.both(lambda backend, side: backend.reset(pair[side]))

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        pair = self.pick(data)
        index = data.draw(st.lists(st.integers(0, len(self.lengths(pair))), max_size=3))
        self.both(lambda backend, side: backend.reorder(pair[side], index))

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        pair = self.pick(data)
        self.keep(self.both(lambda backend, side: backend.fork(pair[side])))

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(data=st.data())
    def gather(self, data: st.DataObject) -> None:
        """Rows of some caches as one: select, repeat, join and split are all this."""
        rows = [(self.pick(data), data.draw(st.integers(-1, 3))) for _ in range(data.draw(st.integers(0, 4)))]
        known = [(pair, row % len(self.lengths(pair))) for pair, row in rows if self.lengths(pair)]
        chosen = known if data.draw(st.integers(0, 3)) else rows
        handles = self.both(lambda backend, side: backend.gather([(pair[side], row) for pair, row in chosen]))
        self.keep(handles)
        if not isinstance(handles[0], str) and len({*self.lengths(self.pairs[-1])}) > 1:
            self.seen.add("a cache of rows of different lengths")

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        """Each backend takes over what the other holds."""
        pair = self.pick(data)
        states = [backend.export_state(handle) for backend, handle in zip(self.backends, pair, strict=True)]
        self.keep(self.both(lambda backend, side: backend.import_state(states[1 - side])))

    @precondition(lambda self: len(self.pairs) < MOST_CACHES)
    @rule(data=st.data())
    def save_and_load(self, data: st.DataObject) -> None:
        """Through a file, the same one whoever wrote it."""
        pair = self.pick(data)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / backend.name for backend in self.backends]
            for backend, handle, path in zip(self.backends, pair, paths, strict=True):
                save_state(path, backend.export_state(handle))
            assert paths[0].read_bytes() == paths[1].read_bytes()
            self.keep(self.both(lambda backend, side: backend.import_state(load_state(paths[1 - side]))))

    @precondition(lambda self: len(self.pairs) > 2)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        pair = self.pick(data)
        self.pairs.remove(pair)
        self.both(lambda backend, side: backend.close(pair[side]))
        self.both(lambda backend, side: backend.open_rows([self.pairs[0][side], pair[side]], [-1], [-1], self.model))

    @invariant()
    def same(self) -> None:
        numpy, native = self.backends
        for first, second in self.pairs:
            state = numpy.export_state(first)
            assert numpy.lengths(first) == native.lengths(second) == state.lengths
            assert numpy.sealed_tokens(first) == native.sealed_tokens(second)
            assert numpy.dense_nbytes(first) == native.dense_nbytes(second)
            assert 0 <= native.shared_nbytes(second) <= native.nbytes(second)
            assert_same(state, native.export_state(second))
            self.seen |= {"freed tokens" for slot in state.slots for row in slot.rows if row.freed}
            self.seen |= {"sealed tokens"} if numpy.sealed_tokens(first) else set()

    def teardown(self) -> None:
        for pair in self.pairs:
            self.both(lambda backend, side, pair=pair: backend.close(pair[side]))  # type: ignore[misc]


REACHED = {
    "a run over 1 caches",
    "a run over 2 caches",
    "a cache of rows of different lengths",
    "freed tokens",
    "sealed tokens",
    "cache _: expected a cache of one row beside others",
    "QuantizedKvSdpa, slot _, row _: new_length: expected at most _, the tokens given",
}


def test_the_same_operations_leave_the_same_caches() -> None:
    BothStores.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
    BothStores.TestCase("runTest").runTest()
    assert not {want for want in REACHED if not any(want in seen for seen in BothStores.seen)}
