"""Requests served together: each as if alone, whoever joins, leaves or fails beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_kivi as kivi
from onnx_kivi.engine.model import BatchedModel
from serving import CHUNK, PROMPTS, Ids, alone, answer, ask, finish, serve, watch
from zoo import MODELS

Opener = Callable[[Path], kivi.Session]
Rewritten = Callable[[int], Path]
VARIED: dict[str, Any] = {"temperature": 8.0}  # the tiny decoder repeats one token otherwise


def test_rows_that_join_and_leave_get_what_they_get_alone(open_session: Opener, rewritten: Rewritten) -> None:
    session = open_session(rewritten(32))
    serving = serve(session, max_batch=3)
    wanted = [(PROMPTS[b, :length], count) for b, (length, count) in enumerate([(5, 9), (40, 3), (17, 12), (33, 1)])]
    channels = [ask(serving, *wanted[b], **VARIED, seed=b) for b in (0, 1)]
    for _ in range(4):
        serving.turn()
    channels += [ask(serving, *wanted[b], **VARIED, seed=b) for b in (2, 3)]
    finish(serving)
    expected = [alone(session, *each, **VARIED, seed=b) for b, each in enumerate(wanted)]
    assert [answer(channel)[0] for channel in channels] == expected
    assert len({*expected[0], *expected[2]}) > 12


def test_sampled_tokens_are_those_of_the_same_seed_alone(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(32))
    serving = serve(session)
    options: dict[str, Any] = VARIED | {"top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    channels = [ask(serving, PROMPTS[b, : 10 + b], 8, **options, seed=b) for b in range(4)]
    finish(serving)
    expected = [alone(session, PROMPTS[b, : 10 + b], 8, **options, seed=b) for b in range(4)]
    assert [answer(channel)[0] for channel in channels] == expected
    assert expected[0] != alone(session, PROMPTS[0, :10], 8, **options, seed=9)


def served(name: str, lengths: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The shapes fed to a model of the zoo that serves prompts of these lengths together, each as if it were alone."""
    config = kivi.KiviConfig(32, 32, block_tokens=16, residual_length=8, sink_length=2)
    kivi.save(kivi.rewrite(MODELS[name], config)[0], tmp_path / "model.onnx")
    session = kivi.Session(tmp_path / "model.onnx")
    prompts = [PROMPTS[b, :length] % 60 for b, length in enumerate(lengths)]
    expected = [alone(session, ids, 8, temperature=2.0, seed=b) for b, ids in enumerate(prompts)]
    fed = watch(session, monkeypatch, lambda _, run: run())
    serving = serve(session)
    channels = [ask(serving, ids, 8, temperature=2.0, seed=b) for b, ids in enumerate(prompts)]
    finish(serving)
    assert [answer(channel)[0] for channel in channels] == expected
    return fed


@pytest.mark.parametrize("name", ["optimum/opt", "optimum/bloom", "genai-fp32/llama"])
def test_models_that_count_positions_by_the_mask_run_ragged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = served(name, (3, 20, 9), tmp_path, monkeypatch)
    assert (3, 1) in fed


def test_prompts_take_turns_with_tokens_of_others(rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    session = kivi.Session(rewritten(8))
    serving = serve(session)
    ask(serving, PROMPTS[0, :4], 20)
    serving.turn()
    fed = watch(session, monkeypatch, lambda _, run: run())
    ask(serving, PROMPTS[1, : 3 * CHUNK], 2)
    for _ in range(6):
        serving.turn()
    assert fed == [(1, 1), (1, CHUNK), (1, 1), (1, CHUNK), (1, 1), (1, CHUNK)]
    serving.turn()
    assert fed[-1] == (2, 1)


def test_a_cache_of_a_prompt_is_the_same_whoever_is_beside_it(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(4))
    lone, crowded = serve(session), serve(session)
    for serving, neighbours in ((lone, 0), (crowded, 3)):
        for b in range(neighbours):
            ask(serving, PROMPTS[b, : 20 * b + 3], 30)
        ask(serving, PROMPTS[7, :90], 30)
        while len(serving.scheduler.running) <= neighbours or serving.scheduler.running[-1].is_prefilling:
            serving.turn()
    caches = [serving.scheduler.running[-1].cache for serving in (lone, crowded)]
    assert caches[0].sealed_tokens == 80
    assert_same_bytes(session, *caches)


def assert_same_bytes(session: kivi.Session, a: kivi.Cache, b: kivi.Cache) -> None:
    from stepping import assert_same

    assert_same(*(session.backend.export_state(cache.handle) for cache in (a, b)))


def test_a_prompt_that_begins_alike_starts_from_the_same_bytes(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(4))
    serving, lone = serve(session), serve(session)
    common, other = PROMPTS[0, :100], np.concatenate([PROMPTS[0, :100], PROMPTS[1, :20]])
    ask(serving, np.concatenate([common, PROMPTS[2, :9]]), 1)
    finish(serving)
    sizes = BatchedModel(session).sizes
    assert serving.prefixes.nbytes == sizes.sealed(96) + sizes.tail(96) + sizes.tail(80) + sizes.tail(48)
    got = ask(serving, other, 9)
    expected = ask(lone, other, 9)
    while not serving.scheduler.running or serving.scheduler.running[0].is_prefilling:
        serving.turn()
    while not lone.scheduler.running or lone.scheduler.running[0].is_prefilling:
        lone.turn()
    assert serving.scheduler.running[0].cache.sealed_tokens == 96
    assert_same_bytes(session, serving.scheduler.running[0].cache, lone.scheduler.running[0].cache)
    finish(serving)
    finish(lone)
    assert (got.cached_tokens, expected.cached_tokens) == (96, 0)
    assert (serving.prefixes.hits, serving.prefixes.saved_tokens) == (1, 96)
    assert answer(got)[0] == answer(expected)[0]


def test_a_failing_row_ends_by_itself(rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    session = kivi.Session(rewritten(32))
    expected = [alone(session, PROMPTS[b, :20], 9, **VARIED, seed=b) for b in range(3)]
    token = expected[1][3]
    assert token not in (*expected[0], *expected[1][:3], *expected[2], *PROMPTS[:3, :20].ravel())

    def fail(ids: Ids, run: Callable[[], Any]) -> Any:
        if token in ids:
            raise kivi.CacheError("row of bad luck")
        return run()

    watch(session, monkeypatch, fail)
    serving = serve(session)
    channels = [ask(serving, PROMPTS[b, :20], 9, **VARIED, seed=b) for b in range(3)]
    finish(serving)
    answers = [answer(channel) for channel in channels]
    assert [tokens for tokens, _ in answers] == [expected[0], expected[1][:4], expected[2]]
    assert [end and end.reason for _, end in answers] == ["length", "error", "length"]
    assert "bad luck" in str(answers[1][1] and answers[1][1].error)
    assert serving.reserved == 0


def test_logits_that_are_no_numbers_end_their_row(rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    session = kivi.Session(rewritten(32))
    expected = [alone(session, PROMPTS[b, :20], 9, **VARIED, seed=b) for b in range(2)]
    token = expected[1][3]
    assert token not in (*expected[0], *expected[1][:3], *PROMPTS[:2, :20].ravel())

    def spoil(ids: Ids, run: Callable[[], Any]) -> Any:
        results = run()
        results[0][(ids == token).any(1)] = np.nan
        return results

    watch(session, monkeypatch, spoil)
    serving = serve(session)
    channels = [ask(serving, PROMPTS[b, :20], 9, **VARIED, seed=b) for b in range(2)]
    finish(serving)
    (good, _), (bad, end) = map(answer, channels)
    assert (good, bad) == (expected[0], expected[1][:4])
    assert isinstance(end and end.error, kivi.UnsupportedModelError)


def test_a_cancelled_row_is_freed_before_the_next_step(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(8))
    serving = serve(session, max_batch=2)
    channels = [ask(serving, PROMPTS[b, :20], 50) for b in range(3)]
    for _ in range(10):
        serving.turn()
    cache, waiting = serving.scheduler.running[0].cache, channels[2]
    channels[0].cancelled.set()
    serving.turn()
    with pytest.raises(kivi.CacheError, match="closed"):
        _ = cache.length
    assert answer(channels[0])[1] is not None
    waiting.cancelled.set()
    finish(serving)
    tokens, end = answer(waiting)
    assert (end and end.reason, len(answer(channels[1])[0])) == ("cancelled", 50)
    assert len(tokens) <= 2


def test_what_does_not_fit_waits_and_nobody_overtakes(rewritten: Rewritten) -> None:
    session = kivi.Session(rewritten(8))
    sizes = BatchedModel(session).sizes
    serving = serve(session, cache_bytes=sizes.whole(120) + sizes.whole(25))
    long, longer, short = (ask(serving, PROMPTS[b, :count], 20) for b, count in enumerate((80, 100, 5)))
    most = 0
    for _ in range(10000):
        if not serving.turn():
            break
        most = max(most, len(serving.scheduler.running))
        assert serving.reserved + serving.prefixes.nbytes <= sizes.whole(120) + sizes.whole(25)
    assert [len(answer(channel)[0]) for channel in (long, longer, short)] == [20, 20, 20]
    assert most == 2


def test_a_model_of_one_length_is_served_by_equal_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = served("optimum/gemma", (9, 9, 14), tmp_path, monkeypatch)
    assert {(1, 1), (2, 1)} <= set(fed)
    assert (3, 1) not in fed
