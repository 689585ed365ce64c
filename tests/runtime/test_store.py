"""What a cache holds on every backend: sinks, blocks, residual, bytes, and crop, fork, reorder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
import stepping
from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend, CacheState, QuantizedBlock, RowState
from onnx_kivi.runtime.select import get_backend
from stepping import assert_same, assert_sealed, filled, run, sdpa, tokens


def test_sinks_fill_first_then_blocks_seal_when_the_residual_is_full(
    backend: Backend, rng: np.random.Generator
) -> None:
    node = sdpa(sink_length=3, block_tokens=4, residual_length=5)
    handle = backend.new_cache()
    shapes = []
    for _ in range(16):
        run(backend, handle, [node], tokens(rng, 1), tokens(rng, 1))
        row = backend.export_state(handle).slots[0].rows[0]
        shapes.append((row.sinks.key.shape[1], len(row.blocks), row.residual.key.shape[1]))
    assert shapes[2:5] == [(3, 0, 0), (3, 0, 1), (3, 0, 2)]
    assert shapes[10:13] == [(3, 0, 8), (3, 1, 5), (3, 1, 6)]
    assert shapes[15] == (3, 2, 5)
    assert backend.sealed_tokens(handle) == 8
    assert backend.length(handle) == 16


@pytest.mark.parametrize("name", ["numpy", "native"])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_same_tokens_in_chunks_leave_the_same_cache_bit_for_bit(name: str, data: st.DataObject) -> None:
    try:
        backend = get_backend(name)
    except Exception as error:
        pytest.skip(str(error))
    bits = st.sampled_from([2, 4, 8, 32])
    node = sdpa(
        k_bits=data.draw(bits),
        v_bits=data.draw(bits),
        block_tokens=data.draw(st.integers(1, 9)),
        v_group_size=data.draw(st.integers(0, 7)),
        residual_length=data.draw(st.integers(0, 9)),
        sink_length=data.draw(st.integers(0, 5)),
    )
    count = data.draw(st.integers(24, 60))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1), max_size=12)))
    rng = np.random.default_rng(count)
    key, value = tokens(rng, count, size=5), tokens(rng, count, size=7)
    whole, chunked = backend.new_cache(), backend.new_cache()
    query = np.zeros((1, 2, 1, 5), np.float32)
    run(backend, whole, [node], key, value, query=query)
    for start, stop in zip([0, *cuts], [*cuts, count], strict=True):
        run(backend, chunked, [node], key[:, :, start:stop], value[:, :, start:stop], query=query)
    assert len(backend.export_state(whole).slots[0].rows[0].blocks) > 0
    assert_same(backend.export_state(whole), backend.export_state(chunked))
    backend.close(whole)
    backend.close(chunked)


def test_outputs_at_32_bits_do_not_depend_on_the_chunks(backend: Backend, rng: np.random.Generator) -> None:
    """Float32 sums in another order: a few units of 2^-24 on values of size one."""
    node = sdpa(k_bits=32, v_bits=32, is_causal=1)
    key, value = tokens(rng, 50), tokens(rng, 50)
    whole, chunked = backend.new_cache(), backend.new_cache()
    [expected] = run(backend, whole, [node], key, value)
    parts = [
        run(backend, chunked, [node], key[:, :, a:b], value[:, :, a:b])[0] for a, b in ((0, 20), (20, 21), (21, 50))
    ]
    np.testing.assert_allclose(np.concatenate(parts, 2), expected, rtol=0, atol=2e-6)
    assert len(backend.export_state(chunked).slots[0].rows[0].blocks) == 12


def test_a_step_attends_to_its_own_tokens_exactly(backend: Backend, rng: np.random.Generator) -> None:
    """At 2 bits a step's own tokens are seen dense: the output is that of the oracle on the given tensors."""
    node = sdpa(k_bits=2, v_bits=2, is_causal=1)
    handle = backend.new_cache()
    key, value = tokens(rng, 30), tokens(rng, 30)
    [output] = run(backend, handle, [node], key, value)
    assert_sealed(backend, handle)
    expected = oracle.attention(node, 0, key[0], key[0], value[0], None, None)
    np.testing.assert_allclose(output[0], expected, rtol=0, atol=2e-6)


def test_a_block_with_nan_or_beyond_float16_stays_dense_and_exact(backend: Backend, rng: np.random.Generator) -> None:
    node = sdpa(k_bits=4, v_bits=4, sink_length=0)
    key, value = tokens(rng, 12), tokens(rng, 12)
    key[0, 1, 5, 2], value[0, 0, 9, 1] = np.nan, 1e30
    handle = backend.new_cache()
    run(backend, handle, [node], key, value)
    blocks = backend.export_state(handle).slots[0].rows[0].blocks
    assert [isinstance(b.key, QuantizedBlock) for b in blocks] == [True, False, True]
    assert [isinstance(b.value, QuantizedBlock) for b in blocks] == [True, True, False]
    np.testing.assert_array_equal(blocks[1].key, key[0, :, 4:8])
    np.testing.assert_array_equal(blocks[2].value, value[0, :, 8:12])
    assert backend.sealed_tokens(handle) == 4


def test_bytes_are_counted_exactly(backend: Backend, rng: np.random.Generator) -> None:
    """2 kv heads, Dk 16, Dv 32, blocks of 16, value groups of 16 (no backend pads these): one sink, 3 blocks, 2 more
    tokens in the residual."""
    node = sdpa(k_bits=4, v_bits=2, block_tokens=16, v_group_size=16)
    handle = backend.new_cache()
    run(backend, handle, [node], tokens(rng, 51, batch=3, size=16), tokens(rng, 51, batch=3, size=32))
    key_block = 2 * 16 * (16 * 4 // 8 + 2 * 2)
    value_block = 2 * 16 * (32 * 2 // 8 + 2 * (2 * 2))
    dense = 2 * (1 + 2) * (16 + 32) * 4
    assert backend.nbytes(handle) == 3 * (3 * (key_block + value_block) + dense)
    assert backend.dense_nbytes(handle) == 3 * 51 * 2 * (16 + 32) * 4
    backend.reset(handle)
    assert backend.nbytes(handle) == backend.dense_nbytes(handle) == 0


def test_no_array_keeps_more_memory_alive_than_is_counted(rng: np.random.Generator) -> None:
    """A view of a longer array would hold on to all of it; the native store counts its own allocations."""
    backend = get_backend("numpy")
    handle = filled(backend, rng, 30, [sdpa(sink_length=3, residual_length=4, v_bits=32)])
    for length in (30, 27, 13, 2):
        backend.crop(handle, length)
        for array in stepping.arrays(backend.export_state(handle).slots[0].rows[0]):
            assert array.base is None or array.base.nbytes == array.nbytes


def test_sealed_tokens_is_the_least_over_quantizing_slots(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0, k_bits=32, v_bits=32), sdpa(1, residual_length=5), sdpa(2, k_bits=32)]
    handle = filled(backend, rng, 14, nodes)
    assert backend.sealed_tokens(handle) == 8
    handle = filled(backend, rng, 14, nodes[:1])
    assert backend.sealed_tokens(handle) == 0


def test_crop_inside_the_residual_is_exact(backend: Backend, rng: np.random.Generator) -> None:
    node = sdpa(residual_length=6)
    key, value = tokens(rng, 24), tokens(rng, 24)
    handle = backend.new_cache()
    run(backend, handle, [node], key, value)
    before = oracle.decoded(node, backend.export_state(handle).slots[0].rows[0])
    backend.crop(handle, 20)
    row = backend.export_state(handle).slots[0].rows[0]
    assert (row.sinks.key.shape[1], len(row.blocks), row.residual.key.shape[1]) == (1, 4, 3)
    after = oracle.decoded(node, row)
    for cropped, whole, exact in zip(after, before, (key[0], value[0]), strict=True):
        np.testing.assert_array_equal(cropped, whole[:, :20])
        np.testing.assert_array_equal(cropped[:, 17:], exact[:, 17:20])
    assert backend.length(handle) == 20


def test_crop_in_a_sealed_block_decodes_what_remains(backend: Backend, rng: np.random.Generator) -> None:
    node = sdpa(k_bits=8, v_bits=8)
    key, value = tokens(rng, 17), tokens(rng, 17)
    handle = backend.new_cache()
    run(backend, handle, [node], key, value)
    before = oracle.decoded(node, backend.export_state(handle).slots[0].rows[0])
    backend.crop(handle, 11)
    row = backend.export_state(handle).slots[0].rows[0]
    assert (row.sinks.key.shape[1], len(row.blocks), row.residual.key.shape[1]) == (1, 2, 2)
    after = oracle.decoded(node, row)
    for cropped, whole, exact in zip(after, before, (key[0], value[0]), strict=True):
        np.testing.assert_allclose(cropped, whole[:, :11], rtol=1e-7, atol=1e-7)
        assert np.abs(cropped - exact[:, :11]).max() > 1e-4
    assert backend.length(handle) == 11


@pytest.mark.parametrize("length", [0, 1, 2, 3, 9])
def test_crop_into_sinks_and_to_nothing_then_appending_fills_up_again(
    backend: Backend, rng: np.random.Generator, length: int
) -> None:
    node = sdpa(sink_length=3)
    key, value = tokens(rng, 20), tokens(rng, 20)
    handle = backend.new_cache()
    run(backend, handle, [node], key, value)
    backend.crop(handle, length)
    assert backend.length(handle) == length
    if length <= 3:
        run(backend, handle, [node], key[:, :, length:], value[:, :, length:])
        whole = backend.new_cache()
        run(backend, whole, [node], key, value)
        assert_same(backend.export_state(handle), backend.export_state(whole))


def test_forks_do_not_see_each_other(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0), sdpa(1)]
    handle = filled(backend, rng, 15, nodes)
    before = backend.export_state(handle)
    fork = backend.fork(handle)
    key = tokens(rng, 9)
    run(backend, fork, nodes, key, key)
    assert_same(backend.export_state(handle), before)
    assert backend.length(fork) == 24
    run(backend, handle, nodes, key, key)
    assert_same(backend.export_state(handle), backend.export_state(fork))
    backend.close(handle)
    assert_sealed(backend, fork)
    backend.crop(fork, 3)
    assert backend.length(fork) == 3


def test_reorder_moves_repeats_and_drops_rows(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0)]
    handle = filled(backend, rng, 15, nodes, batch=3)
    rows = backend.export_state(handle).slots[0].rows
    backend.reorder(handle, [2, 0, 2, 2])
    moved = backend.export_state(handle).slots[0].rows
    for row, source in zip(moved, (2, 0, 2, 2), strict=True):
        for a, b in zip(stepping.arrays(row), stepping.arrays(rows[source]), strict=True):
            np.testing.assert_array_equal(a, b)
    key = tokens(rng, 5, batch=4)
    run(backend, handle, nodes, key, key)
    assert backend.length(handle) == 20
    backend.reorder(handle, [1])
    assert len(backend.export_state(handle).slots[0].rows) == 1


@pytest.mark.parametrize("index", [[], [3], [-1]])
def test_reorder_refuses_rows_that_do_not_exist(backend: Backend, rng: np.random.Generator, index: list[int]) -> None:
    handle = filled(backend, rng, 5, [sdpa(0)], batch=3)
    with pytest.raises(CacheError, match="reorder: expected one or more row numbers from 0 to 2"):
        backend.reorder(handle, index)
    with pytest.raises(CacheError, match="reorder"):
        backend.reorder(backend.new_cache(), index)


def test_crop_refuses_lengths_that_are_not_there(backend: Backend, rng: np.random.Generator) -> None:
    handle = filled(backend, rng, 9, [sdpa(0)])
    for wrong in (-1, 10):
        with pytest.raises(CacheError, match=f"crop: expected a length of 0 to 9.*got {wrong}"):
            backend.crop(handle, wrong)
    assert backend.length(handle) == 9


def test_a_state_that_contradicts_itself_is_refused(backend: Backend, rng: np.random.Generator) -> None:
    """What a file or another backend hands over; cache files have more of this."""
    handle = filled(backend, rng, 9, [sdpa(0), sdpa(1, k_bits=32)], batch=2)
    state = backend.export_state(handle)
    first, second = state.slots
    row, block = first.rows[0], first.rows[0].blocks[0]
    assert isinstance(block.value, QuantizedBlock)
    wide = replace(block.value, codes=np.zeros((2, 4, 7), np.uint8))
    double: Any = row.sinks.key.astype(np.float64)
    codes_at_32_bits = tuple(replace(r, blocks=first.rows[0].blocks) for r in second.rows)
    lies = [
        (replace(state, slots=()), "expected slots that hold the 9 tokens"),
        (replace(state, slots=(first, replace(second, rows=second.rows[:1]))), "as many rows in each slot"),
        (replace(state, slots=(second, first)), "ascending order"),
        (
            replace(state, slots=(first, replace(second, rows=codes_at_32_bits))),
            "as 32 bits say, got codes",
        ),
        (replace(state, slots=(first, replace(second, rows=()))), "expected 9 tokens, got no rows"),
        (with_row(state, replace(row, blocks=row.blocks[:1])), "expected 9 tokens in the row, got 5"),
        (with_row(state, replace(row, blocks=(replace(block, value=wide), row.blocks[1]))), r"uint8 \(2, 4, 6\)"),
        (
            with_row(state, replace(row, sinks=replace(row.sinks, key=double))),
            r"sinks: expected float32 \(2, 1, 6\), got float64",
        ),
        (with_row(state, replace(row, residual=replace(row.residual, key=row.residual.key[0]))), "3 dimensions, got 2"),
    ]
    for lie, message in lies:
        with pytest.raises(CacheError, match=message):
            backend.import_state(lie)
    assert_same(backend.export_state(backend.import_state(state)), state)


def with_row(state: CacheState, row: RowState) -> CacheState:
    """The state with another first row in its first slot."""
    first, *others = state.slots
    return replace(state, slots=(replace(first, rows=(row, *first.rows[1:])), *others))
