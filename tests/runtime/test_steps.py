"""Steps on every backend: tickets, commit, rollback, what a node refuses, and threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import oracle
from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend, ticket_handle
from stepping import NOTHING, assert_same, assert_sealed, filled, model, run, sdpa, tokens


def test_length_advances_only_when_the_last_node_has_run(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0), sdpa(1)]
    handle = filled(backend, rng, 9, nodes)
    before = backend.export_state(handle)
    past, ticket = backend.open_step(handle, -1, model(2))
    assert past == 9
    assert ticket_handle(ticket) == handle
    key = tokens(rng, 6)
    backend.attend(ticket, nodes[0], key, key, key, NOTHING, NOTHING)
    assert_same(backend.export_state(handle), before)
    backend.attend(ticket, nodes[1], key, key, key, NOTHING, NOTHING)
    assert backend.length(handle) == 15
    with pytest.raises(CacheError, match="expected 2 nodes"):
        backend.attend(ticket, nodes[1], key, key, key, NOTHING, NOTHING)
    assert backend.length(handle) == 15


def test_a_failed_node_poisons_its_step_and_the_next_starts_from_the_committed_length(
    backend: Backend, rng: np.random.Generator
) -> None:
    nodes = [sdpa(0), sdpa(1), sdpa(2)]
    handle = filled(backend, rng, 9, nodes)
    before = backend.export_state(handle)
    _, ticket = backend.open_step(handle, -1, model(3))
    key = tokens(rng, 8)
    backend.attend(ticket, nodes[0], key, key, key, NOTHING, NOTHING)
    with pytest.raises(
        CacheError, match=r"slot 1.*attn_mask.*expected shape \(B=1, Hq=2, S=8, T=17\).*got \(1, 1, 8, 9\)"
    ):
        backend.attend(ticket, nodes[1], key, key, key, np.zeros((1, 1, 8, 9), np.float32), NOTHING)
    with pytest.raises(CacheError, match="earlier node of this step failed"):
        backend.attend(ticket, nodes[2], key, key, key, NOTHING, NOTHING)
    assert_same(backend.export_state(handle), before)
    undisturbed = backend.fork(handle)
    run(backend, handle, nodes, key, key)
    run(backend, undisturbed, nodes, key, key)
    assert_sealed(backend, handle)
    assert_same(backend.export_state(handle), backend.export_state(undisturbed))


def test_a_second_step_supersedes_the_first(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0), sdpa(1)]
    handle = filled(backend, rng, 9, nodes)
    key = tokens(rng, 5)
    _, first = backend.open_step(handle, -1, model(2))
    backend.attend(first, nodes[0], key, key, key, NOTHING, NOTHING)
    undisturbed = backend.fork(handle)
    _, second = backend.open_step(handle, -1, model(2))
    backend.attend(second, nodes[0], key, key, key, NOTHING, NOTHING)
    with pytest.raises(CacheError, match="another run on this handle"):
        backend.attend(first, nodes[1], key, key, key, NOTHING, NOTHING)
    backend.attend(second, nodes[1], key, key, key, NOTHING, NOTHING)
    run(backend, undisturbed, nodes, key, key)
    assert backend.length(handle) == 14
    assert_same(backend.export_state(handle), backend.export_state(undisturbed))


@pytest.mark.parametrize("change", [lambda b, h: b.crop(h, 9), lambda b, h: b.reset(h), lambda b, h: b.reorder(h, [0])])
def test_changing_a_cache_ends_its_open_step(
    backend: Backend, rng: np.random.Generator, change: Callable[[Backend, int], None]
) -> None:
    nodes = [sdpa(0), sdpa(1)]
    handle = filled(backend, rng, 9, nodes)
    key = tokens(rng, 2)
    _, ticket = backend.open_step(handle, -1, model(2))
    backend.attend(ticket, nodes[0], key, key, key, NOTHING, NOTHING)
    change(backend, handle)
    with pytest.raises(CacheError, match="the cache was changed"):
        backend.attend(ticket, nodes[1], key, key, key, NOTHING, NOTHING)
    assert backend.length(handle) in (0, 9)


def test_past_length_rewinds_when_the_step_ends(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0)]
    handle = filled(backend, rng, 20, nodes)
    past, ticket = backend.open_step(handle, 7, model(1))
    assert (past, backend.length(handle)) == (7, 20)
    key = tokens(rng, 2)
    backend.attend(ticket, nodes[0], key, key, key, NOTHING, NOTHING)
    assert backend.length(handle) == 9
    for wrong in (10, -2):
        with pytest.raises(CacheError, match=f"past_length: expected -1 or 0 to 9.*got {wrong}"):
            backend.open_step(handle, wrong, model(1))
    assert backend.length(handle) == 9


def test_past_length_zero_restarts_even_with_another_batch(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0)]
    handle = filled(backend, rng, 20, nodes, batch=2)
    key = tokens(rng, 20, batch=3)
    run(backend, handle, nodes, key, key, past_length=0)
    fresh = backend.new_cache()
    run(backend, fresh, nodes, key, key)
    assert_sealed(backend, handle)
    assert_same(backend.export_state(handle), backend.export_state(fresh))


def test_a_cross_slot_is_filled_once_and_survives_rewinding(backend: Backend, rng: np.random.Generator) -> None:
    """The queries see all of the encoder's tokens, whatever the decoder's past; reset alone drops them."""
    own, cross = sdpa(0), sdpa(1, kind="cross", k_bits=32, v_bits=32)
    handle = backend.new_cache()
    encoder_k, encoder_v = tokens(rng, 11), tokens(rng, 11)
    none = tokens(rng, 0)

    def decode(
        count: int, given_k: np.ndarray, given_v: np.ndarray, past_length: int = -1
    ) -> tuple[np.ndarray, np.ndarray]:
        key = tokens(rng, count)
        _, ticket = backend.open_step(handle, past_length, model(2))
        backend.attend(ticket, own, key, key, key, NOTHING, NOTHING)
        return key, backend.attend(ticket, cross, key, given_k, given_v, NOTHING, NOTHING)

    for count, k, v, past in (
        (4, encoder_k, encoder_v, -1),
        (1, none, none, -1),
        (3, none, none, 2),
        (2, none, none, 0),
    ):
        query, output = decode(count, k, v, past)
        expected = oracle.attention(cross, 0, query[0], encoder_k[0], encoder_v[0], None, None)
        np.testing.assert_allclose(output[0], expected, rtol=0, atol=2e-6)
    assert backend.length(handle) == 2
    other_k, other_v = tokens(rng, 6), tokens(rng, 6)
    for k, v in ((other_k, other_v), (none, none)):
        query, output = decode(1, k, v)
        expected = oracle.attention(cross, 0, query[0], other_k[0], other_v[0], None, None)
        np.testing.assert_allclose(output[0], expected, rtol=0, atol=2e-6)
    backend.reset(handle)
    with pytest.raises(CacheError, match="slot 1: expected an encoder's keys and values in the first run, got none"):
        decode(1, none, none)


def test_a_node_without_new_tokens_sees_what_an_earlier_node_gave_its_slot(
    backend: Backend, rng: np.random.Generator
) -> None:
    owner, sharer = sdpa(0, k_bits=32, v_bits=32, is_causal=1), sdpa(0, k_bits=32, v_bits=32, is_causal=1, scale=2.0)
    handle, none = backend.new_cache(), tokens(rng, 0)
    key, value = tokens(rng, 12), tokens(rng, 12)
    for start, stop in ((0, 7), (7, 12)):
        new = slice(start, stop)
        _, ticket = backend.open_step(handle, -1, model(2))
        query, mask = key[:, :, new], np.zeros((1, 1, stop - start, stop), np.float32)
        backend.attend(ticket, owner, query, query, value[:, :, new], mask, NOTHING)
        output = backend.attend(ticket, sharer, query, none, none, mask, NOTHING)
        expected = oracle.attention(sharer, start, query[0], key[0, :, :stop], value[0, :, :stop], None, None)
        np.testing.assert_allclose(output[0], expected, rtol=0, atol=2e-6)
    assert backend.length(handle) == 12


def test_a_slot_takes_new_tokens_once_and_as_many_as_the_others(backend: Backend, rng: np.random.Generator) -> None:
    handle = backend.new_cache()
    with pytest.raises(CacheError, match="once per step"):
        run(backend, handle, [sdpa(0), sdpa(0)], tokens(rng, 3), tokens(rng, 3))
    _, ticket = backend.open_step(handle, -1, model(2))
    three, four = tokens(rng, 3), tokens(rng, 4)
    backend.attend(ticket, sdpa(0), three, three, three, NOTHING, NOTHING)
    with pytest.raises(CacheError, match=r"expected 3 new tokens.*got 4"):
        backend.attend(ticket, sdpa(1), four, four, four, NOTHING, NOTHING)
    assert backend.length(handle) == 0


def test_a_slot_left_behind_is_an_error(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0), sdpa(1)]
    handle = filled(backend, rng, 9, nodes)
    _, ticket = backend.open_step(handle, -1, model(2))
    key, none = tokens(rng, 2), tokens(rng, 0)
    backend.attend(ticket, nodes[0], key, key, key, NOTHING, NOTHING)
    with pytest.raises(CacheError, match=r"slot 1.*expected 11 tokens.*got 9"):
        backend.attend(ticket, nodes[1], key, none, none, NOTHING, NOTHING)
    assert backend.length(handle) == 9


def test_a_handle_belongs_to_the_first_model_and_its_options(backend: Backend, rng: np.random.Generator) -> None:
    handle = filled(backend, rng, 9, [sdpa(0)])
    with pytest.raises(CacheError, match=r"expected model model .*got other"):
        run(backend, handle, [sdpa(0)], tokens(rng, 1), tokens(rng, 1), model_id="other")
    with pytest.raises(CacheError, match=r"k_bits: expected 8.*got 4"):
        run(backend, handle, [sdpa(0, k_bits=4)], tokens(rng, 1), tokens(rng, 1))
    backend.reset(handle)
    with pytest.raises(CacheError, match="expected model model"):
        backend.open_step(handle, -1, model(1, "other"))
    run(backend, handle, [sdpa(0, scale=0.5, softcap=3.0)], tokens(rng, 1), tokens(rng, 1))
    assert backend.length(handle) == 1


def test_each_model_has_one_default_cache(backend: Backend, rng: np.random.Generator) -> None:
    key = tokens(rng, 2)
    lengths = []
    for model_id in ("default a", "default b", "default a"):
        past, ticket = backend.open_step(0, -1, model(1, model_id))
        backend.attend(ticket, sdpa(0), key, key, key, NOTHING, NOTHING)
        lengths.append(past)
    assert lengths == [0, 0, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (1, 2, 3, 5)}, r"key: expected shape \(B=1, Hkv, N, Dk=5\)|query: expected shape"),
        ({"query": (1, 3, 3, 6)}, r"query: expected a multiple of the 2 key/value heads, got 3"),
        ({"query": (1, 2, 6)}, r"query: expected shape \(.*\), got \(1, 2, 6\)"),
        ({"key": (1, 4, 3, 6)}, r"key: expected shape \(B=1, Hkv=2, N=?3?, Dk=6\), got \(1, 4, 3, 6\)"),
        ({"key": (1, 2, 3, 7)}, r"key: expected shape"),
        ({"value": (1, 2, 2, 6)}, r"value: expected shape \(B=1, Hkv=2, N=3, Dv=6\), got \(1, 2, 2, 6\)"),
        ({"value": (2, 2, 3, 6)}, r"value: expected shape"),
        ({"query": (2, 2, 3, 6), "key": (2, 2, 3, 6), "value": (2, 2, 3, 6)}, r"query: expected shape \(B=1"),
        ({"mask": (1, 1, 3, 11)}, r"attn_mask: expected shape \(B=1, Hq=2, S=3, T=12\) \(each may be 1\), got"),
        ({"mask": (3, 12)}, r"attn_mask: expected shape"),
        ({"sink": (3,)}, r"head_sink: expected shape \(Hq=2\), got \(3,\)"),
    ],
)
def test_wrong_shapes_say_what_was_expected(
    backend: Backend, rng: np.random.Generator, change: dict[str, tuple[int, ...]], message: str
) -> None:
    handle = filled(backend, rng, 9, [sdpa(0)])
    shapes: dict[str, tuple[int, ...]] = {
        "query": (1, 2, 3, 6),
        "key": (1, 2, 3, 6),
        "value": (1, 2, 3, 6),
        "mask": (0,),
        "sink": (0,),
    } | change
    arrays = [np.zeros(shape, np.float32) for shape in shapes.values()]
    _, ticket = backend.open_step(handle, -1, model(1))
    with pytest.raises(CacheError, match=message):
        backend.attend(ticket, sdpa(0), *arrays)
    assert backend.length(handle) == 9


def test_wrong_types_are_refused(backend: Backend, rng: np.random.Generator) -> None:
    handle = filled(backend, rng, 9, [sdpa(0)])
    key = tokens(rng, 2)
    _, ticket = backend.open_step(handle, -1, model(1))
    with pytest.raises(CacheError, match="expected float32, got float64"):
        backend.attend(ticket, sdpa(0), key, key.astype(np.float64), key, NOTHING, NOTHING)


def test_a_closed_or_unknown_handle_is_refused_by_everything(backend: Backend, rng: np.random.Generator) -> None:
    handle = filled(backend, rng, 9, [sdpa(0)])
    _, ticket = backend.open_step(handle, -1, model(1))
    backend.close(handle)
    key = tokens(rng, 1)
    uses = [
        backend.close,
        lambda h: backend.open_step(h, -1, model(1)),
        backend.length,
        backend.sealed_tokens,
        backend.nbytes,
        backend.dense_nbytes,
        lambda h: backend.crop(h, 0),
        backend.reset,
        backend.fork,
        lambda h: backend.reorder(h, [0]),
        backend.export_state,
    ]
    for use in uses:
        for wrong in (handle, handle + 2_000_000):
            with pytest.raises(CacheError, match="expected an open handle"):
                use(wrong)
    with pytest.raises(CacheError, match="expected an open handle"):
        backend.attend(ticket, sdpa(0), key, key, key, NOTHING, NOTHING)


def test_threads_on_their_own_handles_do_not_disturb_each_other(backend: Backend, rng: np.random.Generator) -> None:
    nodes = [sdpa(0), sdpa(1)]
    key, value = tokens(rng, 40), tokens(rng, 40)

    def work(_: int) -> int:
        handle = backend.new_cache()
        for i in range(40):
            run(backend, handle, nodes, key[:, :, i : i + 1], value[:, :, i : i + 1])
        return handle

    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(work, range(8)))
    expected = backend.new_cache()
    run(backend, expected, nodes, key, value)
    assert_sealed(backend, expected)
    for handle in handles:
        assert_same(backend.export_state(handle), backend.export_state(expected))


def test_threads_on_one_handle_lose_steps_but_never_mix_them(backend: Backend) -> None:
    """Runs and crops at once on one handle: all slots end with the same tokens, each run's made of its number."""
    nodes = [sdpa(slot, k_bits=32, v_bits=32) for slot in range(3)]
    handle = backend.new_cache()
    refused = []
    start = threading.Barrier(4)

    def runs(number: int) -> None:
        key = np.full((1, 2, 1, 6), number, np.float32)
        start.wait()
        for _ in range(60):
            try:
                run(backend, handle, nodes, key, key)
            except CacheError as error:
                refused.append(str(error))

    def crops() -> None:
        start.wait()
        for _ in range(60):
            try:
                backend.crop(handle, backend.length(handle) // 2)
            except CacheError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=runs, args=(n,)) for n in (1, 2, 3)] + [threading.Thread(target=crops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state = backend.export_state(handle)
    decoded = [oracle.decoded(slot.attributes, slot.rows[0]) for slot in state.slots if slot.rows]
    for keys, values in decoded:
        assert keys.shape[1] == state.length
        np.testing.assert_array_equal(keys, decoded[0][0])
        np.testing.assert_array_equal(values, decoded[0][0])
    known = ("another run", "crop: expected", "the last run to end")
    assert not [text for text in refused if not any(words in text for words in known)]
