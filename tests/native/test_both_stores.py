"""The native store does what the NumPy store does: the same operations leave the same caches, bit for bit, and are
refused with the same words."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend, make_ticket
from onnx_kivi.runtime.cache_file import load_state, save_state
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import CROSS, StepAttributes
from onnx_kivi.spec_schemes import AFFINE, K_SCHEMES, V_BITS, V_SCHEMES, k_bits_of
from stepping import NOTHING, assert_same, sdpa, tokens

pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)

# What q k^T and p v may differ by: the native kernel rounds each query to 16 bits for its integer products, 2^-15 of
# the largest of some 10 terms of size 1 to 10.
ATTENTION_TOLERANCE = 5e-3

Pair = tuple[int, int]
"""Handles of the same cache in the NumPy store and in the native one."""

K_SIZE, V_SIZE, MOST_CACHES = 5, 7, 5


Scheme = tuple[str, int]


def schemes(k: Scheme, v: Scheme) -> dict[str, Any]:
    """Attributes of (scheme, bits) of keys and of values."""
    return {"k_scheme": k[0], "k_bits": k[1], "v_scheme": v[0], "v_bits": v[1]}


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
        k=st.tuples(*[st.sampled_from([(s, b) for s in K_SCHEMES for b in k_bits_of(s)])] * 2),
        v=st.tuples(*[st.sampled_from([(s, b) for s in V_SCHEMES for b in V_BITS[s]])] * 2),
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
        k: tuple[Scheme, Scheme],
        v: tuple[Scheme, Scheme],
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
            sdpa(0, is_causal=1, **schemes(k[0], v[0]), **options),
            sdpa(1, **schemes(k[1], v[1]), **windows, **options),
            sdpa(2, kind=CROSS, **schemes(k[0], v[1]), **options),
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

        for wrong in (pair, self.pairs[0][::-1], (0, 0), (-1, -1), (2**30, 2**30)):
            self.refused((wrong[0], wrong[1]))

    def refused(self, wrong: Pair) -> None:
        """A closed handle, one of the other backend and a number from nowhere are refused in the same words."""
        key = tokens(self.rng, 1, size=K_SIZE)
        tickets = [make_ticket(handle, 0) for handle in wrong]
        self.both(lambda backend, side: backend.crop(wrong[side], 0))
        self.both(lambda backend, side: backend.reorder(wrong[side], [0]))
        self.both(lambda backend, side: backend.gather([(wrong[side], 0)]))
        self.both(lambda b, side: b.attend(tickets[side], self.nodes[0], key, key, key, NOTHING, NOTHING))

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


class BothStoresAndOddNodes(BothStores):
    """As above, among runs that no model makes."""

    @rule(data=st.data())
    def step_of_odd_nodes(self, data: st.DataObject) -> None:
        """On a fork: each node has sizes of its own, zeros among them, now and then another bit width than its slot."""
        pair = self.pick(data)
        forks = [backend.fork(handle) for backend, handle in zip(self.backends, pair, strict=True)]
        usual = (len(self.lengths(pair)) or 1, 2, K_SIZE, V_SIZE)
        calls = []
        for node in data.draw(st.lists(st.sampled_from(self.nodes), min_size=1, max_size=4)):
            odd = data.draw(st.sampled_from([None, None, 0, 1, 2, 3]))
            sizes = [data.draw(st.integers(0, 3)) if i == odd else size for i, size in enumerate(usual)]
            rows, heads, k_size, v_size = sizes
            count = data.draw(st.sampled_from([0, 2, 2, 2, 3]))
            query = tokens(self.rng, 2, batch=rows, heads=data.draw(st.sampled_from([2, 2, 4, 3, 0])), size=k_size)
            key = tokens(self.rng, count, batch=rows, heads=heads, size=k_size)
            value = tokens(self.rng, count, batch=rows, heads=heads, size=v_size)
            scheme, bits = data.draw(st.sampled_from([(node.k_scheme, node.k_bits)] * 5 + [(AFFINE, 8), (AFFINE, 32)]))
            calls.append((replace(node, k_scheme=scheme, k_bits=bits), query, key, value))
        step = replace(self.model, layers=data.draw(st.sampled_from([len(calls), 3, 3])))

        def call(backend: Backend, side: int) -> None:
            _, ticket = backend.open_rows([forks[side]], [-1], [-1], step)
            for node, query, key, value in calls:
                backend.attend(ticket, node, query, key, value, NOTHING, NOTHING)

        self.both(call)
        assert_same(*(backend.export_state(fork) for backend, fork in zip(self.backends, forks, strict=True)))
        self.both(lambda backend, side: backend.close(forks[side]))


MOST_ROUNDS = 6
"""Random programs differ in what they reach; so many rounds without it are no accident."""

REACHED = {
    "a run over 1 caches",
    "a run over 2 caches",
    "a cache of rows of different lengths",
    "freed tokens",
    "sealed tokens",
}


def not_reached() -> set[str]:
    return {want for want in REACHED if not any(want in seen for seen in BothStores.seen)}


def test_the_same_operations_leave_the_same_caches() -> None:
    BothStores.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
    for _ in range(MOST_ROUNDS):
        BothStores.TestCase("runTest").runTest()
        if not not_reached():
            return
    assert not not_reached()


def test_rare_refusals_are_worded_alike() -> None:
    """What random runs reach too seldom to ask it of them."""
    stores = BothStores()
    stores.nodes, stores.rng = [sdpa(slot) for slot in range(3)], np.random.default_rng(0)
    stores.model = StepAttributes(model_id="model", layers=3, spec_version=2)
    stores.pairs = [stores.new_pair() for _ in "ab"]

    def words(pairs: Sequence[Pair], rows: int, new_lengths: list[int]) -> Any:
        key = tokens(stores.rng, 4, batch=rows, size=K_SIZE)
        run = Run([-1], new_lengths, key, key, key, NOTHING, nodes=3, fills=True, fault=None)
        return stores.both(lambda backend, side: stores.do_run(backend, [pair[side] for pair in pairs], run))[0]

    assert "new_length: expected at most 4, the tokens given, got 5" in words(stores.pairs[:1], 1, [5])
    assert isinstance(words(stores.pairs[:1], 2, [-1]), list)
    assert "expected a cache of one row beside others, got one of 2 rows" in words(stores.pairs, 3, [-1])


def test_odd_nodes_are_served_or_refused_alike() -> None:
    BothStoresAndOddNodes.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    BothStoresAndOddNodes.TestCase("runTest").runTest()
