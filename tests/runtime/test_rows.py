"""Rows of their own, on every backend: ragged steps, rows gathered from caches, windows that free, errors by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.cache import Cache
from onnx_kivi.runtime.cache_file import load_state, save_state
from onnx_kivi.spec import SdpaAttributes, StepAttributes
from stepping import NOTHING, assert_same, assert_sealed, filled, run, sdpa, tokens

Array = np.ndarray[Any, np.dtype[np.float32]]
Random = np.random.Generator

NODES = [
    sdpa(0, is_causal=1),
    sdpa(1, k_bits=2, v_bits=4, residual_length=3, is_causal=1),
    sdpa(2, k_bits=32, v_bits=32),
]
STEP = StepAttributes(model_id="model", layers=len(NODES), spec_version=2)
ALONE = StepAttributes(model_id="model", layers=1, spec_version=2)


def attend_all(
    backend: Backend, ticket: int, key: Array, mask: Array = NOTHING, nodes: Sequence[SdpaAttributes] = NODES
) -> list[Array]:
    """Every node's output of a step whose queries and values are its keys (B, Hkv, S, D)."""
    return [backend.attend(ticket, node, key, key, key, mask, NOTHING) for node in nodes]


def caches_of(backend: Backend, rng: Random, lengths: Sequence[int]) -> list[int]:
    """A cache of one row for each length."""
    handles = []
    for length in lengths:
        handle = backend.new_cache()
        if length:
            key = tokens(rng, length)
            _, ticket = backend.open_step(handle, -1, STEP)
            attend_all(backend, ticket, key)
        handles.append(handle)
    return handles


def right_aligned(rows: Sequence[Array], width: int) -> Array:
    """(B, H, width, D) of rows (1, H, n, D), padded on the left with numbers that nobody may read."""
    padded = np.full((len(rows), *rows[0].shape[1:2], width, rows[0].shape[3]), 1e6, np.float32)
    for b, row in enumerate(rows):
        padded[b, :, width - row.shape[2] :] = row[0]
    return padded


@pytest.mark.parametrize("lengths", [(5, 11, 2), (0, 9, 0), (7, 7, 7), (1, 40, 3)])
@pytest.mark.parametrize("new", [(3, 3, 3), (1, 4, 2)])
def test_a_ragged_step_is_each_row_alone(
    backend: Backend, rng: Random, lengths: tuple[int, ...], new: tuple[int, ...]
) -> None:
    handles = caches_of(backend, rng, lengths)
    alone = [backend.fork(handle) for handle in handles]
    for _ in range(3):
        rows = [tokens(rng, n) for n in new]
        past, ticket = backend.open_rows(handles, [-1], list(new), STEP)
        assert past == tuple(backend.lengths(handle)[0] if backend.length(handle) else 0 for handle in alone)
        together = attend_all(backend, ticket, right_aligned(rows, max(new)))
        for b, (handle, row) in enumerate(zip(alone, rows, strict=True)):
            _, ticket = backend.open_step(handle, -1, STEP)
            for got, want in zip(together, attend_all(backend, ticket, row), strict=True):
                np.testing.assert_allclose(got[b : b + 1, :, max(new) - new[b] :], want, atol=1e-5)
                assert not got[b, :, : max(new) - new[b]].any()
    for handle, other in zip(handles, alone, strict=True):
        assert_same(backend.export_state(handle), backend.export_state(other))
    assert_sealed(backend, handles[1])


def test_a_row_takes_the_last_columns_of_its_mask(backend: Backend, rng: Random) -> None:
    lengths, new = (6, 2), (3, 1)
    handles = caches_of(backend, rng, lengths)
    alone = [backend.fork(handle) for handle in handles]
    rows = [tokens(rng, n) for n in new]
    bias = rng.standard_normal((2, 2, 3, 6 + 3)).astype(np.float32)
    _, ticket = backend.open_rows(handles, [-1], list(new), STEP)
    together = attend_all(backend, ticket, right_aligned(rows, 3), bias)
    for b, (handle, row) in enumerate(zip(alone, rows, strict=True)):
        _, ticket = backend.open_step(handle, -1, STEP)
        own = np.ascontiguousarray(bias[b : b + 1, :, 3 - new[b] :, 9 - lengths[b] - new[b] :])
        for got, want in zip(together, attend_all(backend, ticket, row, own), strict=True):
            np.testing.assert_allclose(got[b : b + 1, :, 3 - new[b] :], want, atol=1e-5)


def test_rows_of_one_cache_may_differ_in_length_and_be_cut_apart(backend: Backend, rng: Random) -> None:
    handles = caches_of(backend, rng, (9, 4))
    handle = backend.gather([(handles[0], 0), (handles[1], 0), (handles[0], 0)])
    assert backend.lengths(handle) == (9, 4, 9)
    assert backend.length(handle) == 9
    past, ticket = backend.open_rows([handle], [-1, 3, 5], [-1], STEP)
    assert past == (9, 3, 5)
    attend_all(backend, ticket, tokens(rng, 2, batch=3))
    assert backend.lengths(handle) == (11, 5, 7)
    backend.crop_rows(handle, [11, 0, 6])
    assert backend.lengths(handle) == (11, 0, 6)
    backend.crop(handle, 8)
    assert backend.lengths(handle) == (8, 0, 6)
    backend.crop(handle, 0)
    assert backend.lengths(handle) == ()


@pytest.mark.parametrize("past", [[-1], [2, 8], [0]], ids=str)
@pytest.mark.parametrize("how", ["a node fails", "superseded", "another run on one of them", "closed"])
def test_a_ragged_step_that_fails_leaves_every_row_as_it_was(
    backend: Backend, rng: Random, how: str, past: list[int]
) -> None:
    handles = caches_of(backend, rng, (5, 8))
    before = [backend.export_state(handle) for handle in handles]
    _, ticket = backend.open_rows(handles, past, [-1], STEP)
    key = tokens(rng, 2, batch=2)
    backend.attend(ticket, NODES[0], key, key, key, NOTHING, NOTHING)
    if how == "a node fails":
        with pytest.raises(CacheError, match="attn_mask: expected shape"):
            backend.attend(ticket, NODES[1], key, key, key, np.zeros((1, 1, 1, 77), np.float32), NOTHING)
    elif how == "superseded":
        backend.open_rows(handles, [-1], [-1], STEP)
    elif how == "another run on one of them":
        backend.open_step(handles[1], -1, STEP)
    else:
        backend.close(handles[1])
    with pytest.raises(CacheError):
        backend.attend(ticket, NODES[2], key, key, key, NOTHING, NOTHING)
    for handle, state in zip(handles[: 1 if how == "closed" else 2], before, strict=False):
        assert_same(backend.export_state(handle), state)
        run_one(backend, handle, rng)


def run_one(backend: Backend, handle: int, rng: Random) -> None:
    """The cache still takes a token."""
    length = backend.length(handle)
    _, ticket = backend.open_step(handle, -1, STEP)
    attend_all(backend, ticket, tokens(rng, 1))
    assert backend.length(handle) == length + 1


def bad_steps(handles: list[int], wide: int, closed: int) -> list[tuple[tuple[Any, ...], StepAttributes, str]]:
    other = StepAttributes(model_id="other", layers=3, spec_version=2)
    first, second = handles
    return [
        (([first, first], [-1], [-1]), STEP, f"row 1: cache {first}: expected a cache of its own"),
        (([], [-1], [-1]), STEP, "expected at least one cache, got none"),
        (([first, closed], [-1], [-1]), STEP, f"row 1: cache {closed}: expected an open handle"),
        (([first, 0], [-1], [-1]), STEP, "row 1: cache_handle: expected a cache, got 0"),
        (([first, wide], [-1], [-1]), STEP, f"row 1: cache {wide}: expected a cache of one row"),
        (([first, second], [-1, 99], [-1]), STEP, f"row 1: cache {second}: past_length: expected -1 or 0 to 8"),
        (([first, second], [-1, -1, -1], [-1]), STEP, "past_length: expected 1 number or 2"),
        (([first, second], [-1], [1, 1, 1]), STEP, "new_length: expected 1 number or 2"),
        (([first, second], [-1], [1, 0]), STEP, "row 1: new_length: expected -1 or at least 1, got 0"),
        (([first, second], [-1], [-2, 1]), STEP, "row 0: new_length: expected -1 or at least 1, got -2"),
        (([first, second], [-1], [-1]), other, "row 0: cache .*: expected model model"),
        (([wide], [3, 3, 3], [-1]), STEP, "past_length: expected 1 number or 2"),
    ]


def test_a_step_that_cannot_be_opened_names_the_row_and_changes_nothing(backend: Backend, rng: Random) -> None:
    handles = caches_of(backend, rng, (5, 8))
    wide = backend.gather([(handles[0], 0), (handles[0], 0)])
    closed = backend.new_cache()
    backend.close(closed)
    before = [backend.export_state(handle) for handle in (*handles, wide)]
    for (rows, past, new), step, message in bad_steps(handles, wide, closed):
        with pytest.raises(CacheError, match=message):
            backend.open_rows(rows, past, new, step)
        for handle, state in zip((*handles, wide), before, strict=True):
            assert_same(backend.export_state(handle), state)


@pytest.mark.parametrize("version", [1, 2])
def test_a_model_that_needs_one_length_says_why(backend: Backend, rng: Random, version: int) -> None:
    wire = {} if version == 1 else {"one_length": "positions are counted from P"}
    step = StepAttributes(model_id="strict", layers=1, spec_version=version, **wire)
    handles = [backend.new_cache() for _ in "ab"]
    for handle, count in zip(handles, (3, 4), strict=True):
        _, ticket = backend.open_step(handle, -1, step)
        key = tokens(rng, count)
        backend.attend(ticket, sdpa(), key, key, key, NOTHING, NOTHING)
    message = "rewritten by version 1" if version == 1 else "positions are counted from P"
    for past, new in (([-1], [-1]), ([3], [2, 1])):
        with pytest.raises(CacheError, match=message):
            backend.open_rows(handles, past, new, step)
    lengths, ticket = backend.open_rows(handles, [3], [-1], step)
    assert lengths == (3, 3)
    assert set(backend.members(ticket)) == set(handles)


def test_more_new_tokens_than_are_given_are_refused(backend: Backend, rng: Random) -> None:
    handles = caches_of(backend, rng, (5, 8))
    _, ticket = backend.open_rows(handles, [-1], [2, 3], STEP)
    key = tokens(rng, 2, batch=2)
    with pytest.raises(CacheError, match="row 1: new_length: expected at most 2, the tokens given, got 3"):
        backend.attend(ticket, NODES[0], key, key, key, NOTHING, NOTHING)


def test_gathered_rows_share_what_is_sealed_and_part_when_they_grow(backend: Backend, rng: Random) -> None:
    node = sdpa(0, block_tokens=16, residual_length=16)
    handle = filled(backend, rng, 400, [node])
    whole = backend.nbytes(handle)
    assert backend.shared_nbytes(handle) == 0
    forks = [backend.gather([(handle, 0)])]
    assert backend.shared_nbytes(handle) == whole
    forks += [backend.gather([(handle, 0)]) for _ in range(7)]
    assert backend.shared_nbytes(handle) == whole
    assert sum(backend.nbytes(f) - backend.shared_nbytes(f) for f in forks) == 0
    for fork in forks:
        run(backend, fork, [node], tokens(rng, 1), tokens(rng, 1))
    own = [backend.nbytes(f) - backend.shared_nbytes(f) for f in forks]
    assert all(0 < bytes_ < whole / 4 for bytes_ in own)
    backend.close(handle)
    for fork in forks[1:]:
        backend.close(fork)
    assert backend.shared_nbytes(forks[0]) == 0
    assert backend.length(forks[0]) == 401


def test_gather_refuses_what_does_not_belong_together(backend: Backend, rng: Random) -> None:
    a, b = filled(backend, rng, 9, [sdpa(0)]), filled(backend, rng, 9, [sdpa(0, k_bits=2)])
    wide = filled(backend, rng, 9, [sdpa(0)], batch=2)
    empty, closed = backend.new_cache(), backend.new_cache()
    backend.close(closed)
    other = backend.new_cache()
    run(backend, other, [sdpa(0)], tokens(rng, 9), tokens(rng, 9), model_id="other")
    for rows, message in (
        ([], "at least one row"),
        ([(a, 1)], "row number from 0 to 0, got 1"),
        ([(wide, -1)], "row number from 0 to 1, got -1"),
        ([(a, 0), (empty, 0)], f"cache {empty}: expected a cache that holds tokens"),
        ([(a, 0), (closed, 0)], f"cache {closed}: expected an open handle"),
        ([(a, 0), (b, 0)], f"cache {b}: expected slots of the same options, heads and sizes as cache {a}"),
        ([(a, 0), (other, 0)], "expected model"),
    ):
        with pytest.raises(CacheError, match=message):
            backend.gather(rows)
    joined = backend.gather([(wide, 1), (a, 0), (wide, 0)])
    held = backend.export_state(joined).slots[0].rows
    assert len(held) == 3
    np.testing.assert_array_equal(held[0].sinks.key, backend.export_state(wide).slots[0].rows[1].sinks.key)


def test_caches_are_joined_split_selected_and_repeated(backend: Backend, rng: Random) -> None:
    with Cache(backend, filled(backend, rng, 9, [sdpa(0)], batch=2)) as cache, cache.repeat(2) as four:
        assert four.lengths == (9, 9, 9, 9)
        rows, wide = (backend.export_state(c.handle).slots[0].rows for c in (cache, four))
        for row, source in zip(wide, (0, 0, 1, 1), strict=True):
            np.testing.assert_array_equal(row.residual.key, rows[source].residual.key)
        parts = cache.split()
        parts[1].crop(4)
        with Cache.join([parts[1], four, parts[0]]) as joined, joined.select([5, 0]) as two:
            assert joined.lengths == (4, 9, 9, 9, 9, 9)
            assert two.lengths == (9, 4)
        refused: list[tuple[Callable[[], Cache], str]] = [
            (lambda: cache.select([2]), "row number"),
            (lambda: cache.repeat(0), "1 to 65536 times"),
            (lambda: Cache.join([]), "at least one cache"),
            (lambda: Cache.join([cache, Cache(backend, backend.new_cache())]), "an empty one"),
        ]
        for wrong, message in refused:
            with pytest.raises(CacheError, match=message):
                wrong()


def slid(backend: Backend, rng: Random, count: int, node: SdpaAttributes) -> tuple[int, Array]:
    """A cache that was fed `count` random tokens, some at a time, and the tokens."""
    handle, key = backend.new_cache(), tokens(rng, count)
    for begin in range(0, count, 7):
        part = key[:, :, begin : begin + 7]
        _, ticket = backend.open_step(handle, -1, ALONE)
        backend.attend(ticket, node, part, part, part, NOTHING, NOTHING)
    return handle, key


@pytest.mark.parametrize("bits", [8, 32])
def test_a_window_frees_what_no_query_can_see_and_nothing_else(backend: Backend, rng: Random, bits: int) -> None:
    node = sdpa(0, window=10, evict=1, spec_version=2, k_bits=bits, v_bits=bits, residual_length=2)
    handle, key = slid(backend, rng, 100, node)
    whole, _ = slid(backend, rng, 100, replace(node, evict=0))
    state = backend.export_state(handle)
    row = state.slots[0].rows[0]
    assert (backend.length(handle), row.sinks.tokens) == (100, 1)
    assert row.freed == (100 - 10) // 4 * 4
    assert backend.nbytes(handle) < backend.nbytes(whole) / 4
    new = tokens(rng, 3)
    _, ticket = backend.open_step(handle, -1, ALONE)
    output = backend.attend(ticket, node, new, new, new, NOTHING, NOTHING)
    if bits == 32:
        given = np.concatenate((key, new), 2).astype(np.float64)[0]
        np.testing.assert_allclose(output[0], windowed(new[0], given, 100, 10), atol=1e-5)
    backend.crop(handle, 0)
    assert backend.lengths(handle) == ()


def windowed(query: Array, whole: Array, position: int, window: int) -> Array:
    """Plain attention of queries (H, S, D) at `position` over the tokens (H, T, D) in their window, float64."""
    scores = np.einsum("hsd,htd->hst", query, whole)
    places = np.arange(whole.shape[1])
    for s in range(query.shape[1]):
        seen = (places <= position + s) & (places > position + s - window)
        scores[:, s, ~seen] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    output: Array = np.einsum("hst,htd->hsd", p / p.sum(-1, keepdims=True), whole)
    return output


def test_a_crop_past_the_freed_part_is_refused_and_others_are_exact(backend: Backend, rng: Random) -> None:
    node = sdpa(0, window=10, evict=1, spec_version=2, residual_length=2)
    handle, _ = slid(backend, rng, 100, node)
    row = backend.export_state(handle).slots[0].rows[0]
    least = row.sinks.tokens + row.freed + node.window - 1
    for cut in (
        lambda: backend.crop(handle, least - 1),
        lambda: backend.open_step(handle, 40, ALONE),
        lambda: backend.crop_rows(handle, [3]),
    ):
        with pytest.raises(CacheError, match=f"expected 0 or at least {least}, as slot 0 has freed"):
            cut()
    assert backend.length(handle) == 100
    backend.crop(handle, least)
    assert backend.length(handle) == least


def test_a_window_is_only_freed_if_all_readers_of_the_slot_have_it(backend: Backend, rng: Random) -> None:
    writer = sdpa(0, window=10, residual_length=2, evict=1, spec_version=2)
    reader = sdpa(0, residual_length=2)
    step = StepAttributes(model_id="shared", layers=2, spec_version=2)
    handle = backend.new_cache()
    for _ in range(20):
        key = tokens(rng, 5)
        _, ticket = backend.open_step(handle, -1, step)
        backend.attend(ticket, writer, key, key, key, NOTHING, NOTHING)
        backend.attend(ticket, reader, key, key[:, :, :0], key[:, :, :0], NOTHING, NOTHING)
    assert backend.export_state(handle).slots[0].rows[0].freed == 0
    assert_sealed(backend, handle)


def test_a_node_of_version_1_frees_nothing(backend: Backend, rng: Random) -> None:
    handle, _ = slid(backend, rng, 100, sdpa(0, window=10, residual_length=2))
    assert backend.export_state(handle).slots[0].rows[0].freed == 0
    backend.crop(handle, 3)
    assert backend.length(handle) == 3


def test_window_sinks_stay_seen_beyond_the_window(backend: Backend, rng: Random) -> None:
    node = sdpa(
        0, window=8, evict=1, sink_length=4, window_sinks=3, k_bits=32, v_bits=32, residual_length=2, spec_version=2
    )
    handle, key = slid(backend, rng, 60, node)
    assert backend.export_state(handle).slots[0].rows[0].freed > 0
    new = tokens(rng, 2)
    _, ticket = backend.open_step(handle, -1, ALONE)
    output = backend.attend(ticket, node, new, new, new, NOTHING, NOTHING)
    whole = np.concatenate((key, new), 2).astype(np.float64)[0]
    scores = np.einsum("hsd,htd->hst", new[0], whole)
    places = np.arange(62)
    for s in range(2):
        hidden = (places > 60 + s) | ((places <= 60 + s - 8) & (places >= 3))
        scores[:, s, hidden] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(output[0], np.einsum("hst,htd->hsd", p / p.sum(-1, keepdims=True), whole), atol=1e-5)


def test_ragged_and_freed_states_go_through_files_of_version_2(backend: Backend, rng: Random, tmp_path: Path) -> None:
    ragged = backend.gather([(handle, 0) for handle in caches_of(backend, rng, (9, 30))])
    freed, _ = slid(backend, rng, 100, sdpa(0, window=10, residual_length=2, evict=1, spec_version=2))
    plain = filled(backend, rng, 9, [sdpa(0)], batch=2)
    for handle, version in ((ragged, 2), (freed, 2), (plain, 1)):
        state = backend.export_state(handle)
        save_state(tmp_path / "cache", state)
        assert (tmp_path / "cache").read_bytes()[6:8] == version.to_bytes(2, "little")
        again = backend.import_state(load_state(tmp_path / "cache"))
        assert_same(backend.export_state(again), state)
        assert backend.lengths(again) == backend.lengths(handle)


def test_a_saved_row_is_one_row(backend: Backend, rng: Random, tmp_path: Path) -> None:
    handle = filled(backend, rng, 9, [sdpa(0)], batch=3)
    with Cache(backend, handle) as cache, cache.select([2]) as row:
        row.save(tmp_path / "row")
        with Cache.load(tmp_path / "row", backend) as loaded:
            assert_same(backend.export_state(loaded.handle), backend.export_state(row.handle))
