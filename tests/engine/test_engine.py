"""Engine: streams from a thread of its own, what it refuses, and how it ends."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_kivi as kivi
from onnx_kivi.run.session import Session
from serving import CHUNK, PROMPTS, alone
from zoo import MODELS

Rewritten = Callable[[int], Path]


class Letters:
    """A tokenizer whose tokens are letters."""

    stop_tokens = ()

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture
def session(rewritten: Rewritten) -> kivi.Session:
    return kivi.Session(rewritten(32))


@pytest.fixture
def engine(session: kivi.Session) -> Iterator[kivi.Engine]:
    with kivi.Engine(session, prefill_chunk=CHUNK, tokenizer=Letters(), max_length=150) as opened:
        yield opened


def until(holds: Callable[[], bool]) -> None:
    """Wait for what the engine's thread is about to do."""
    for _ in range(3000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("it never came about")


def test_streams_read_from_many_threads_are_those_of_lone_runs(session: kivi.Session, engine: kivi.Engine) -> None:
    answers: dict[int, list[int]] = {}

    def read(b: int) -> None:
        answers[b] = list(engine.submit(PROMPTS[b, : 5 + 9 * b], max_new_tokens=6 + b, temperature=8.0, seed=b))

    threads = [threading.Thread(target=read, args=(b,)) for b in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {b: alone(session, PROMPTS[b, : 5 + 9 * b], 6 + b, temperature=8.0, seed=b) for b in range(8)}
    assert len({*answers[7]}) > 5


def test_a_stream_says_why_it_ended_and_what_it_knew(session: kivi.Session, engine: kivi.Engine) -> None:
    options: dict[str, Any] = {"temperature": 8.0, "seed": 3}
    expected = alone(session, PROMPTS[0, :50], 6, **options)
    first = engine.submit(PROMPTS[0, :50], max_new_tokens=6, **options, logprobs=3)
    assert (list(first), first.reason, first.cached_tokens) == (expected, "length", 0)
    assert [token.id for token in first.logprobs] == expected
    assert all(len(token.top) == 3 and token.log_prob is not None for token in first.logprobs)
    assert all(token.log_prob <= token.top[0][1] for token in first.logprobs if token.log_prob is not None)
    again = engine.submit(PROMPTS[0, :50], max_new_tokens=6, **options, stop_tokens=[expected[3]])
    assert (list(again), again.reason, again.cached_tokens) == (expected[: expected.index(expected[3])], "stop", 48)
    text = Letters().decode(expected)
    stopped = engine.submit(PROMPTS[0, :50], max_new_tokens=6, **options, stop=text[2:4])
    assert (list(stopped), stopped.reason) == (expected[: text.index(text[2:4])], "stop")
    begun = engine.submit(PROMPTS[0, :50], max_new_tokens=6, **options, stop=f"{text[-1]}~")
    assert (list(begun), begun.reason) == (expected, "length")
    nothing = engine.submit(PROMPTS[0, :50], max_new_tokens=0)
    assert (list(nothing), nothing.reason) == ([], "length")
    assert list(nothing) == []


def test_a_reader_that_stops_reading_holds_nobody_up(engine: kivi.Engine) -> None:
    unread = engine.submit(PROMPTS[0, :30], max_new_tokens=40)
    assert len(list(engine.submit(PROMPTS[1, :30], max_new_tokens=60))) == 60
    until(lambda: engine.stats().running == 0)
    assert len(list(unread)) == 40


def test_a_stream_that_is_dropped_or_cancelled_ends(session: kivi.Session) -> None:
    with kivi.Engine(session) as engine:
        dropped, cancelled = (engine.submit(PROMPTS[b, :30], max_new_tokens=100_000) for b in range(2))
        assert next(dropped) == next(engine.submit(PROMPTS[0, :30], max_new_tokens=1))
        cancelled.cancel()
        del dropped
        gc.collect()
        until(lambda: engine.stats().running == 0)
        assert len(list(cancelled)) < 100_000
        assert cancelled.reason == "cancelled"


def test_an_error_of_the_model_comes_from_its_stream(
    session: kivi.Session, engine: kivi.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise kivi.CacheError("no luck")

    monkeypatch.setattr(session, "run", fail)
    stream = engine.submit(PROMPTS[0, :5])
    with pytest.raises(kivi.CacheError, match="no luck"):
        next(stream)
    assert stream.reason == "error"
    assert list(stream) == []
    monkeypatch.undo()
    assert len(list(engine.submit(PROMPTS[0, :5], max_new_tokens=3))) == 3


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "ids: expected one prompt of at least one token"),
        ([256], {}, "ids: expected integers from 0 to 255, got 256"),
        ([-1], {}, "ids: expected integers from 0"),
        ([0.5], {}, "ids: expected integers"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens: expected an integer >= 0"),
        ([1], {"max_new_tokens": 150}, "max_new_tokens: expected at most 150 tokens with the prompt, got 151"),
        ([1], {"temperature": -1}, "temperature"),
        ([1], {"top_k": -1}, "top_k"),
        ([1], {"stop_tokens": ["x"]}, "stop_tokens: expected integers"),
        ([1], {"stop": ""}, "stop: expected strings of at least one character"),
        ([1], {"stop": [3]}, "stop: expected strings"),
        ([1], {"logprobs": -1}, "logprobs: expected an integer >= 0, or None"),
    ],
)
def test_bad_requests_are_refused_at_once(
    engine: kivi.Engine, ids: list[int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(kivi.ConfigError, match=message):
        engine.submit(ids, **options)
    assert engine.stats().waiting == engine.stats().running == 0


def test_a_request_larger_than_the_budget_is_refused(session: kivi.Session) -> None:
    with kivi.Engine(session, cache_bytes=100_000) as engine:
        with pytest.raises(kivi.ConfigError, match=r"cache within cache_bytes = 100000, got 505 tokens .* which take"):
            engine.submit(PROMPTS[0, :5], max_new_tokens=500)
        with pytest.raises(kivi.ConfigError, match="stop: expected an engine with a tokenizer"):
            engine.submit([1], stop="x")


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"cache_bytes": -1}, {"prefill_chunk": 0}, {"max_length": -3}])
def test_bad_engines_are_refused(session: kivi.Session, options: dict[str, Any]) -> None:
    with pytest.raises(kivi.ConfigError, match=f"{next(iter(options))}: expected an integer >= 1"):
        kivi.Engine(session, **options)


def test_a_model_that_is_fed_more_than_tokens_is_refused(tmp_path: Path) -> None:
    model = MODELS["optimum/t5/decoder_with_past_model"]
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(cross=True))[0], tmp_path / "model.onnx")
    with pytest.raises(kivi.UnsupportedModelError, match="expected a decoder that takes tokens"):
        kivi.Engine(Session(tmp_path / "model.onnx"))


def test_closing_ends_what_runs_and_what_waits_and_frees_the_caches(session: kivi.Session) -> None:
    engine = kivi.Engine(session, max_batch=1)
    streams = [engine.submit(PROMPTS[b, :30], max_new_tokens=500) for b in range(2)]
    next(streams[0])
    engine.close()
    assert [len(list(stream)) < 500 for stream in streams] == [True, True]
    assert [stream.reason for stream in streams] == ["cancelled", "cancelled"]
    assert engine.stats().reserved_bytes == engine.stats().retained_bytes == 0
    with pytest.raises(kivi.ConfigError, match="expected one that is open, got one that was closed"):
        engine.submit([1])
    engine.close()


def test_a_model_that_takes_one_row_says_so(caplog: pytest.LogCaptureFixture) -> None:
    golden = Path(__file__).parents[1] / "golden"
    session = kivi.Session(golden / "spec-1-format-1" / "model" / "rewritten.onnx")
    with caplog.at_level(logging.WARNING), kivi.Engine(session) as engine:
        assert engine.mode == "one by one"
        assert "version 1 of the op" in caplog.text
        prompts = [np.arange(3 + b) for b in range(2)]
        streams = [engine.submit(ids, max_new_tokens=5) for ids in prompts]
        assert [list(stream) for stream in streams] == [alone(session, ids, 5) for ids in prompts]
