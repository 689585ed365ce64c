"""Session.run with a list of caches: each row as if it ran alone, on each host, and clear errors for bad lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import onnx_kivi as kivi
from onnx_kivi.runtime.select import get_backend

Opener = Callable[[Path], kivi.Session]
Rewritten = Callable[[int], Path]
Array = npt.NDArray[Any]

ROUNDING = 1e-4
LENGTHS = (60, 7, 33)
IDS = np.random.default_rng(5).integers(0, 256, (3, 80))


def feeds(past: Sequence[int], rows: Sequence[Array]) -> dict[str, Array]:
    """Row b has the tokens rows[b], behind past[b] others: right-aligned, as a left-padded batch is."""
    new = np.array([len(row) for row in rows])
    total = max(past) + new.max()
    ids = np.zeros((len(rows), new.max()), np.int64)
    mask = np.zeros((len(rows), total), np.int64)
    for b, row in enumerate(rows):
        ids[b, -len(row) :] = row
        mask[b, total - past[b] - len(row) :] = 1
    positions = np.clip(mask.cumsum(1) - 1, 0, None)[:, -new.max() :]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "new_length": new}


def step(session: kivi.Session, caches: Sequence[kivi.Cache], rows: Sequence[Array], **more: Any) -> Array:
    given = feeds([cache.length for cache in caches], rows) | more
    return np.asarray(session.run(["logits"], given, cache=caches)[0])


def filled(session: kivi.Session, lengths: Sequence[int] = LENGTHS) -> list[kivi.Cache]:
    caches = [session.new_cache() for _ in lengths]
    for b, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
        step(session, [cache], [IDS[b, :length]])
    return caches


@pytest.mark.parametrize("bits", [32, 8])
def test_rows_that_join_and_leave_are_as_if_alone(open_session: Opener, rewritten: Rewritten, bits: int) -> None:
    session = open_session(rewritten(bits))
    together, alone = filled(session), filled(session)
    assert together[0].sealed_tokens == (0 if bits == 32 else 48)
    for batch, new in (((0, 1, 2), (1, 1, 1)), ((2, 0), (4, 1)), ((1,), (2,)), ((1, 2, 0), (3, 1, 2))):
        rows = [IDS[b, together[b].length :][:count] for b, count in zip(batch, new, strict=True)]
        got = step(session, [together[b] for b in batch], rows)
        for b, row, logits in zip(batch, rows, got, strict=True):
            np.testing.assert_allclose(logits[-len(row) :], step(session, [alone[b]], [row])[0], atol=ROUNDING)
    assert [cache.length for cache in together] == [cache.length for cache in alone]


def test_rows_go_back_each_to_its_own_length(open_session: Opener, rewritten: Rewritten) -> None:
    session = open_session(rewritten(8))
    caches, alone = filled(session), filled(session, (60, 5, 20))
    rows = [IDS[b, past : past + 2] for b, past in enumerate((60, 5, 20))]
    got = step(session, caches, rows, **feeds((60, 5, 20), rows), past_length=np.array([60, 5, 20]))
    for b in (0, 1):
        np.testing.assert_allclose(got[b], step(session, [alone[b]], [rows[b]])[0], atol=ROUNDING)
    assert [cache.length for cache in caches] == [62, 7, 22]


def bad_lists(session: kivi.Session, caches: list[kivi.Cache]) -> list[tuple[Any, str]]:
    closed = session.new_cache()
    closed.close()
    a, b, _ = caches
    wide = kivi.Cache.join([a, b])
    return [
        ([], "expected a cache, or at least one in a list, got none"),
        ([a, a], "row 1: cache .* a cache of its own for each row"),
        ([a, closed], "closed"),
        ([a, wide], "row 1: cache .*: expected a cache of one row"),
        ([a, 3], "expected a cache or a list of caches, got 3 as number 1"),
        ("ab", "expected a cache or a list of caches, got 'a' as number 0"),
        ([a, elsewhere(session)], "row 1: cache .*: expected one of backend"),
    ]


def anything(value: Any) -> Any:
    """The value, of a type that nobody checks before the run."""
    return value


def elsewhere(session: kivi.Session) -> kivi.Cache:
    """An empty cache of another backend."""
    other = get_backend("numpy" if session.backend.name == "native" else "native")
    return kivi.Cache(other, other.new_cache())


def test_bad_lists_change_nothing(open_session: Opener, rewritten: Rewritten) -> None:
    session = open_session(rewritten(8))
    caches = filled(session)
    rows = [np.array([3]), np.array([4])]
    given = feeds((60, 7), rows)
    for wrong, message in bad_lists(session, caches):
        with pytest.raises(kivi.CacheError, match=message):
            session.run(None, given, cache=wrong)
    assert [cache.length for cache in caches] == [*LENGTHS]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: kivi.Cache.join([cache, anything(5)]), "join: expected caches, got 5"),
        (kivi.Cache.join, "join: expected a list of caches, got <Cache"),
        (lambda cache: cache.select(0), "select: expected a list of row numbers, got 0"),
        (lambda cache: cache.reorder(None), "reorder: expected a list of row numbers, got None"),
        (lambda cache: cache.crop(np.array([[1]])), "crop: expected an integer of 64 bits"),
    ],
)
def test_what_is_no_list_is_refused(
    open_session: Opener, rewritten: Rewritten, call: Callable[[Any], object], message: str
) -> None:
    cache = filled(open_session(rewritten(8)))[0]
    with pytest.raises(kivi.CacheError, match=message):
        call(cache)
    assert cache.length == LENGTHS[0]
    assert kivi.Cache.join(each for each in (cache, cache)).lengths == (LENGTHS[0],) * 2
    cache.crop(np.array([1]))
    assert cache.length == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"new_length": np.array([1, 0])}, "row 1: new_length: expected -1 or at least 1, got 0"),
        ({"new_length": np.array([-3, 1])}, "row 0: new_length: expected -1 or at least 1, got -3"),
        ({"new_length": np.array([1, 5])}, "new_length"),
        ({"new_length": np.array([1, 1, 1])}, "new_length: expected 1 number or 2"),
        ({"past_length": np.array([61, -1])}, "row 0: cache .*: past_length"),
    ],
)
def test_bad_lengths_change_nothing(
    open_session: Opener, rewritten: Rewritten, given: dict[str, Array], message: str
) -> None:
    session = open_session(rewritten(8))
    caches = filled(session)
    with pytest.raises(kivi.CacheError, match=message):
        step(session, caches[:2], [IDS[0, 60:61], IDS[1, 7:8]], **given)
    assert [cache.length for cache in caches] == [*LENGTHS]
    step(session, caches[:2], [IDS[0, 60:61], IDS[1, 7:8]])
    assert [cache.length for cache in caches] == [61, 8, 33]


def test_a_batch_of_another_size_than_the_list_changes_nothing(open_session: Opener, rewritten: Rewritten) -> None:
    session = open_session(rewritten(8))
    caches = filled(session)
    given = feeds((60, 7, 33), [IDS[b, :1] for b in range(3)])
    with pytest.raises(kivi.CacheError, match="2"):
        session.run(None, given | {"new_length": np.array([-1])}, cache=caches[:2])
    assert [cache.length for cache in caches] == [*LENGTHS]


def test_another_models_cache_in_a_list_changes_nothing(open_session: Opener, rewritten: Rewritten) -> None:
    session, other = open_session(rewritten(8)), open_session(rewritten(4))
    [mine], [foreign] = filled(session, (9,)), filled(other, (9,))
    with pytest.raises(kivi.CacheError, match=r"row 1: cache .*: expected model"):
        step(session, [mine, foreign], [IDS[0, 9:10]] * 2)
    assert (mine.length, foreign.length) == (9, 9)
