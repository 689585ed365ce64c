"""The native store does what the NumPy store does: the same operations leave the same cache, bit for bit, and are
refused with the same words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from onnx_kivi import spec
from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend, make_ticket
from onnx_kivi.runtime.select import get_backend
from stepping import NOTHING, assert_same, model, sdpa, tokens

_native = pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)

# What q k^T and p v may differ by: the native kernel rounds each query to 16 bits for its integer products, 2^-15 of
# the largest of some 10 terms of size 1 to 10.
ATTENTION_TOLERANCE = 5e-3


def test_the_native_tables_are_those_of_the_spec() -> None:
    def rows(attributes: type[spec.StepAttributes | spec.SdpaAttributes]) -> list[tuple[str, str, object]]:
        return [(a.name, a.wire, a.default) for a in attributes.specs()]

    def native_rows(specs: list[tuple[str, str, object]]) -> list[tuple[str, str, object]]:
        wired = [
            (name, wire, repr(default) if isinstance(default, float) else default) for name, wire, default in specs
        ]
        assert {wire for _, wire, _ in wired} == {"int", "string"}
        return wired

    assert native_rows(_native.step_attribute_specs()) == rows(spec.StepAttributes)
    assert native_rows(_native.sdpa_attribute_specs()) == rows(spec.SdpaAttributes)
    floats = [t for t in spec.QUANTIZED_KV_SDPA.inputs if t.element == "float"]
    assert _native.tensor_specs() == [(t.name, t.shape, t.optional, t.broadcast) for t in floats]


class BothStores(RuleBasedStateMachine):
    """Drives both backends with the same calls. Two `self` slots, and a `cross` slot that the first run fills."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[int, int]] = []
        self.backends: tuple[Backend, Backend] = (get_backend("numpy"), get_backend("native"))

    @initialize(
        bits=st.tuples(*[st.sampled_from([2, 4, 8, 32])] * 4),
        block=st.integers(1, 6),
        residual=st.integers(0, 7),
        sinks=st.integers(0, 3),
        group=st.integers(0, 5),
        seed=st.integers(0, 2**16),
    )
    def configure(
        self, bits: tuple[int, int, int, int], block: int, residual: int, sinks: int, group: int, seed: int
    ) -> None:
        options = {"block_tokens": block, "residual_length": residual, "sink_length": sinks, "v_group_size": group}
        self.nodes = [
            sdpa(0, k_bits=bits[0], v_bits=bits[1], is_causal=1, **options),
            sdpa(1, k_bits=bits[2], v_bits=bits[3], **options),
            sdpa(2, k_bits=bits[0], v_bits=bits[3], kind="cross", **options),
        ]
        self.rng = np.random.default_rng(seed)
        self.pairs = [(self.backends[0].new_cache(), self.backends[1].new_cache())]

    def both(self, pair: tuple[int, int], call: Callable[[Backend, int], Any]) -> list[Any]:
        """Results of `call(backend, handle)` on both; an error must be the same on both."""
        results = []
        for backend, handle in zip(self.backends, pair, strict=True):
            try:
                results.append(call(backend, handle))
            except CacheError as error:
                results.append(re.sub(r"cache \d+", "cache _", str(error)))
        if isinstance(results[0], str) or isinstance(results[1], str):
            assert results[0] == results[1]
        return results

    def rows(self, pair: tuple[int, int]) -> int:
        state = self.backends[0].export_state(pair[0])
        return max((len(slot.rows) for slot in state.slots), default=0)

    @rule(data=st.data(), count=st.integers(1, 14), fresh=st.booleans())
    def step(self, data: st.DataObject, count: int, fresh: bool) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        length = self.backends[0].length(pair[0])
        past_length = data.draw(st.one_of(st.just(-1), st.integers(0, length + 1)))
        batch = self.rows(pair) or data.draw(st.integers(1, 3))
        done = data.draw(st.sampled_from([3, 3, 3, 3, 1, 2]))
        fault = data.draw(st.sampled_from([None, None, None, "heads", "mask", "twice"]))
        key, value = tokens(self.rng, count, batch=batch, size=5), tokens(self.rng, count, batch=batch, size=7)
        if data.draw(st.integers(0, 5)) == 0:
            key[0, 0, 0, 0] = np.nan if data.draw(st.booleans()) else 1e9
        other = tokens(self.rng, count, batch=batch, size=5)

        def call(backend: Backend, handle: int) -> list[npt.NDArray[np.float32]]:
            _, ticket = backend.open_step(handle, past_length, model(3))
            outputs = []
            for i, node in enumerate(self.nodes[:done]):
                cross_filled = node.kind == "cross" and backend.export_state(handle).slots and not fresh
                k, v = (key[:, :, :0], value[:, :, :0]) if cross_filled else (key, value)
                if fault == "heads" and i == done - 1:
                    k = k[:, :1]
                served = self.nodes[0] if fault == "twice" and i == 1 else node
                mask = np.zeros((1, 1, 1, 10**4), np.float32) if fault == "mask" and i == 1 else NOTHING
                outputs.append(backend.attend(ticket, served, other, k, v, mask, NOTHING))
            return outputs

        results = self.both(pair, call)
        if not isinstance(results[0], str) and not np.isnan(key).any() and np.abs(key).max() < 1e6:
            for a, b in zip(*results, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=ATTENTION_TOLERANCE)

    @rule(data=st.data())
    def step_of_odd_nodes(self, data: st.DataObject) -> None:
        """Each node has sizes of its own, zeros among them, and now and then another bit width than its slot."""
        pair = data.draw(st.sampled_from(self.pairs))
        usual = (self.rows(pair) or 1, 2, 5, 7)
        calls = []
        for node in data.draw(st.lists(st.sampled_from(self.nodes), min_size=1, max_size=4)):
            odd = data.draw(st.sampled_from([None, None, 0, 1, 2, 3]))
            sizes = [data.draw(st.integers(0, 3)) if i == odd else size for i, size in enumerate(usual)]
            batch, heads, k_size, v_size = sizes
            count = data.draw(st.sampled_from([0, 2, 2, 2, 3]))
            query = tokens(self.rng, 2, batch=batch, heads=data.draw(st.sampled_from([2, 2, 4, 3, 0])), size=k_size)
            key = tokens(self.rng, count, batch=batch, heads=heads, size=k_size)
            value = tokens(self.rng, count, batch=batch, heads=heads, size=v_size)
            bits = data.draw(st.sampled_from([node.k_bits] * 5 + [8, 32]))
            calls.append((replace(node, k_bits=bits), query, key, value))
        layers = data.draw(st.sampled_from([len(calls), 3, 3]))

        def call(backend: Backend, handle: int) -> None:
            _, ticket = backend.open_step(handle, -1, model(layers))
            for node, query, key, value in calls:
                backend.attend(ticket, node, query, key, value, NOTHING, NOTHING)

        self.both(pair, call)

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        """A closed handle, and one of the other backend, are refused like one that was never given out."""
        pair = self.pairs.pop(data.draw(st.integers(0, len(self.pairs) - 1)))
        self.both(pair, lambda backend, handle: backend.close(handle))
        key = tokens(self.rng, 1, size=5)
        for wrong in (pair, self.pairs[0][::-1], (0, 0), (-1, -1), (2**30, 2**30)):
            self.both(wrong, lambda backend, handle: backend.crop(handle, 0))
            self.both(wrong, lambda backend, handle: backend.reorder(handle, [0]))
            ticket = make_ticket(wrong[0], 0), make_ticket(wrong[1], 0)
            self.both(ticket, lambda b, t: b.attend(t, self.nodes[0], key, key, key, NOTHING, NOTHING))

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        length = data.draw(st.integers(-1, self.backends[0].length(pair[0]) + 1))
        self.both(pair, lambda backend, handle: backend.crop(handle, length))

    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        if data.draw(st.integers(0, 3)) == 0:
            self.both(pair, lambda backend, handle: backend.reset(handle))

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        first, second = self.both(pair, lambda backend, handle: backend.fork(handle))
        self.pairs.append((first, second))

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        pair = data.draw(st.sampled_from(self.pairs))
        index = data.draw(st.lists(st.integers(0, max(self.rows(pair), 1) - 1), max_size=3))
        self.both(pair, lambda backend, handle: backend.reorder(handle, index))

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        """Each backend takes over what the other holds."""
        pair = data.draw(st.sampled_from(self.pairs))
        numpy, native = self.backends
        from_native = numpy.import_state(native.export_state(pair[1]))
        self.pairs.append((from_native, native.import_state(numpy.export_state(pair[0]))))

    @invariant()
    def same(self) -> None:
        numpy, native = self.backends
        for first, second in self.pairs:
            assert numpy.length(first) == native.length(second)
            assert numpy.sealed_tokens(first) == native.sealed_tokens(second)
            assert numpy.dense_nbytes(first) == native.dense_nbytes(second)
            assert_same(numpy.export_state(first), native.export_state(second))

    def teardown(self) -> None:
        for pair in self.pairs:
            self.both(pair, lambda backend, handle: backend.close(handle))


def test_the_same_operations_leave_the_same_cache() -> None:
    BothStores.TestCase.settings = settings(max_examples=60, stateful_step_count=14, deadline=None)
    BothStores.TestCase("runTest").runTest()
