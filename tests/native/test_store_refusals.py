"""What a step refuses, on both stores in the same words: batches that differ, sizes of nothing, missing nodes."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest

from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec_types import MAX_SIZE
from stepping import NOTHING, assert_same, assert_sealed, filled, model, run, sdpa, tokens

pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)


def refusal(use: Callable[[Backend], object]) -> str:
    """What both stores refuse `use` with."""
    words = []
    for name in ("numpy", "native"):
        with pytest.raises(CacheError) as caught:
            use(get_backend(name))
        words.append(re.sub(r"cache \d+", "cache _", str(caught.value)))
    assert words[0] == words[1]
    return words[0]


def test_nodes_of_different_batches_do_not_commit(rng: np.random.Generator) -> None:
    eight, one = tokens(rng, 9, batch=8), tokens(rng, 9)

    def use(backend: Backend) -> None:
        handle = backend.new_cache()
        _, ticket = backend.open_step(handle, -1, model(2))
        backend.attend(ticket, sdpa(0), eight, eight, eight, NOTHING, NOTHING)
        try:
            backend.attend(ticket, sdpa(1), one, one, one, NOTHING, NOTHING)
        finally:
            assert backend.length(handle) == 0
            assert backend.export_state(handle).slots == ()

    assert refusal(use) == "cache _: expected as many rows in each slot, got [1, 8]"


def test_a_mask_of_no_tokens_is_not_taken_for_none(rng: np.random.Generator) -> None:
    key = tokens(rng, 3)

    def use(backend: Backend) -> None:
        _, ticket = backend.open_step(backend.new_cache(), -1, model(1))
        backend.attend(ticket, sdpa(0), key, key, key, np.zeros((1, 1, 3, 0), np.float32), NOTHING)

    assert "attn_mask: expected shape" in refusal(use)


def test_a_cross_slot_has_as_many_rows_as_the_others(rng: np.random.Generator) -> None:
    two, three = tokens(rng, 9, batch=2), tokens(rng, 9, batch=3)

    def use(backend: Backend) -> None:
        handle = backend.new_cache()
        _, ticket = backend.open_step(handle, -1, model(2))
        backend.attend(ticket, sdpa(0), two, two, two, NOTHING, NOTHING)
        backend.attend(ticket, sdpa(1, kind="cross"), three, three, three, NOTHING, NOTHING)

    assert refusal(use) == "cache _: expected as many rows in each slot, got [2, 3]"


def test_rows_of_caches_with_other_heads_or_sizes_are_not_one_batch(rng: np.random.Generator) -> None:
    def use(backend: Backend, other: np.ndarray) -> None:
        handles, key = [backend.new_cache(), backend.new_cache()], tokens(rng, 9)
        for handle, given in zip(handles, (key, other), strict=True):
            run(backend, handle, [sdpa(0)], given, given)
        before = [backend.export_state(handle) for handle in handles]
        _, ticket = backend.open_rows(handles, [-1], [-1], model(1))
        two = tokens(rng, 3, batch=2)
        try:
            backend.attend(ticket, sdpa(0), two, two, two, NOTHING, NOTHING)
        finally:
            for handle, state in zip(handles, before, strict=True):
                assert_same(backend.export_state(handle), state)

    words = "slot 0 of cache _: expected heads and head sizes 2, 6 and 6, as the rows before, got {}, {} and {}"
    assert refusal(lambda backend: use(backend, tokens(rng, 9, size=9))) == words.format(2, 9, 9)
    assert refusal(lambda backend: use(backend, tokens(rng, 9, heads=3))) == words.format(3, 6, 6)


def test_a_slot_that_was_emptied_and_not_filled_again_does_not_commit(rng: np.random.Generator) -> None:
    key = tokens(rng, 9)

    def use(backend: Backend) -> None:
        handle = filled(backend, rng, 9, [sdpa(0), sdpa(1)])
        _, ticket = backend.open_step(handle, 0, model(2))
        backend.attend(ticket, sdpa(0), key, key, key, NOTHING, NOTHING)
        backend.attend(ticket, sdpa(1), key, key[:, :, :0], key[:, :, :0], NOTHING, NOTHING)

    assert refusal(use) == "slot 1 of cache _: expected 9 tokens at the end of the step, got 0"


def test_rows_are_moved_and_saved_after_batches_were_refused(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0), sdpa(1)]
    handle = filled(backend, rng, 9, nodes, batch=2)
    before = backend.export_state(handle)
    two, three = tokens(rng, 5, batch=2), tokens(rng, 5, batch=3)
    _, ticket = backend.open_step(handle, -1, model(2))
    backend.attend(ticket, nodes[0], two, two, two, NOTHING, NOTHING)
    with pytest.raises(CacheError, match="query: expected shape"):
        backend.attend(ticket, nodes[1], three, three, three, NOTHING, NOTHING)
    assert_same(backend.export_state(handle), before)
    backend.reorder(handle, [1, 1, 0])
    assert_sealed(backend, handle)
    assert [len(slot.rows) for slot in backend.export_state(handle).slots] == [3, 3]


SHAPES = {"query": (1, 2, 3, 6), "key": (1, 2, 3, 6), "value": (1, 2, 3, 6)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": (0, 2, 3, 6), "key": (0, 2, 3, 6), "value": (0, 2, 3, 6)}, "query: expected B from 1"),
        ({"query": (1, 0, 3, 6)}, "query: expected Hq from 1"),
        ({"key": (1, 0, 3, 6), "value": (1, 0, 3, 6)}, "key: expected Hkv from 1"),
        ({"query": (1, 2, 3, 0), "key": (1, 2, 3, 0)}, "query: expected Dk from 1"),
        ({"value": (1, 2, 3, 0)}, "value: expected Dv from 1"),
        ({"value": (1, 2, 3, MAX_SIZE + 1)}, "value: expected Dv from 1"),
    ],
)
def test_sizes_are_from_one_to_the_most(changes: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = SHAPES | changes

    def use(backend: Backend) -> None:
        handle = backend.new_cache()
        _, ticket = backend.open_step(handle, -1, model(1))
        try:
            query, key, value = (np.zeros(shapes[name], np.float32) for name in SHAPES)
            backend.attend(ticket, sdpa(0), query, key, value, NOTHING, NOTHING)
        finally:
            assert backend.length(handle) == 0

    name = message.split(":", maxsplit=1)[0]
    assert refusal(use) == f"QuantizedKvSdpa, slot 0: {message} to {MAX_SIZE}, got shape {shapes[name]}"


def test_the_largest_sizes_are_taken(backend: Backend) -> None:
    narrow, wide = np.zeros((1, 1, 5, 1), np.float32), np.zeros((1, 1, 5, MAX_SIZE), np.float32)
    handle = backend.new_cache()
    run(backend, handle, [sdpa(0, v_group_size=0)], narrow, wide)
    assert_sealed(backend, handle)


def test_a_run_of_which_nodes_are_missing_is_told_at_the_next_step(rng: np.random.Generator) -> None:
    key = tokens(rng, 9)

    def use(backend: Backend) -> None:
        handle = backend.new_cache()
        for _ in range(2):
            _, ticket = backend.open_step(handle, -1, model(5))
            for slot in range(3):
                backend.attend(ticket, sdpa(slot), key, key, key, NOTHING, NOTHING)

    assert refusal(use) == (
        "cache _: expected the last run to end, but 3 of 5 nodes ran; if it was stopped, run again, else rewrite the "
        "original model again"
    )


def test_a_stale_node_does_not_pass_for_one_that_failed(rng: np.random.Generator) -> None:
    two = tokens(rng, 9, batch=2)

    def use(backend: Backend) -> None:
        first, second = backend.new_cache(), backend.new_cache()
        _, ticket = backend.open_rows([first, second], [-1], [-1], model(2))
        backend.attend(ticket, sdpa(0), two, two, two, NOTHING, NOTHING)
        backend.reset(first)
        with pytest.raises(CacheError, match="got a stale one"):
            backend.attend(ticket, sdpa(1), two, two, two, NOTHING, NOTHING)
        backend.open_step(second, -1, model(2))

    assert refusal(use).startswith("cache _: expected the last run to end, but 1 of 2 nodes ran")


def test_after_that_the_cache_takes_whole_runs(backend: Backend, rng: np.random.Generator) -> None:
    nodes, key = [sdpa(slot) for slot in range(3)], tokens(rng, 9)
    handle = backend.new_cache()
    _, ticket = backend.open_step(handle, -1, model(3))
    backend.attend(ticket, nodes[0], key, key, key, NOTHING, NOTHING)
    with pytest.raises(CacheError, match="1 of 3 nodes ran"):
        backend.open_step(handle, -1, model(3))
    run(backend, handle, nodes, key, key)
    assert_sealed(backend, handle)


@pytest.mark.parametrize("done", [0, 1])
def test_a_step_that_was_stopped_is_superseded_in_silence_once_all_nodes_are_known_to_run(
    backend: Backend, rng: np.random.Generator, done: int
) -> None:
    nodes = [sdpa(0), sdpa(1)]
    handle = filled(backend, rng, 9, nodes)
    key = tokens(rng, 2)
    for _ in range(3):
        _, ticket = backend.open_step(handle, 0, model(2))
        for node in nodes[:done]:
            backend.attend(ticket, node, key, key, key, NOTHING, NOTHING)
    run(backend, handle, nodes, key, key)
    assert backend.length(handle) == 11


def test_a_failed_step_is_not_taken_for_one_of_missing_nodes(backend: Backend, rng: np.random.Generator) -> None:
    key, handle = tokens(rng, 9), backend.new_cache()
    for _ in range(3):
        _, ticket = backend.open_step(handle, -1, model(2))
        backend.attend(ticket, sdpa(0), key, key, key, NOTHING, NOTHING)
        with pytest.raises(CacheError, match="expected 9 new tokens"):
            backend.attend(ticket, sdpa(1), key[:, :, :4], key[:, :, :4], key[:, :, :4], NOTHING, NOTHING)
