"""onnxruntime-genai runs a rewritten folder as it ran the original: the same tokens, whatever it does to its past."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og
import pytest

import host_folders
import onnx_kivi as kivi

PROMPT = np.array([5, 143, 98, 77, 3, 200, 41, 9, 66], np.int32)
OTHER = np.array([17, 230, 8, 91, 155, 12, 60, 101, 33], np.int32)
NEW = 50

Tokens = list[list[int]]
Scenario = Callable[[Any], Tokens]


def generator(model: Any, length: int, **options: Any) -> Any:
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(**{"do_sample": False, "max_length": length, "min_length": length} | options)
    return og.Generator(model, parameters)


def finished(running: Any, rows: int = 1) -> Tokens:
    while not running.is_done():
        running.generate_next_token()
    return [running.get_sequence(row).tolist() for row in range(rows)]


def alone(model: Any, prompt: Any = PROMPT, **options: Any) -> Tokens:
    running = generator(model, len(prompt) + NEW, **options)
    running.append_tokens(prompt[None])
    return finished(running)


def greedy(model: Any) -> Tokens:
    return alone(model)


def sampled(model: Any) -> Tokens:
    return alone(model, do_sample=True, top_k=20, temperature=1.5, random_seed=5)


def one_after_another(model: Any) -> Tokens:
    return [tokens for prompt in (PROMPT, OTHER) * 3 for tokens in alone(model, prompt)]


def side_by_side(model: Any) -> Tokens:
    pair = [generator(model, len(PROMPT) + NEW) for _ in range(2)]
    for running, prompt in zip(pair, (PROMPT, OTHER), strict=True):
        running.append_tokens(prompt[None])
    while not pair[0].is_done():
        for running in pair:
            running.generate_next_token()
    return [running.get_sequence(0).tolist() for running in pair]


def rewound(length: int) -> Scenario:
    def run(model: Any) -> Tokens:
        running = generator(model, 150, min_length=0)
        running.append_tokens(PROMPT[None])
        for _ in range(40):
            running.generate_next_token()
        before = running.get_sequence(0).tolist()
        running.rewind_to(length)
        running.append_tokens(OTHER[None])
        for _ in range(20):
            running.generate_next_token()
        return [before, running.get_sequence(0).tolist()]

    return run


def in_chunks(model: Any) -> Tokens:
    return alone(model, np.concatenate((PROMPT, OTHER)), chunk_size=5)


def batch(*prompts: Any) -> Scenario:
    def run(model: Any) -> Tokens:
        running = generator(model, len(prompts[0]) + NEW, batch_size=len(prompts))
        running.append_tokens(np.stack(prompts))
        return finished(running, len(prompts))

    return run


def padded(prompt: Any, left: int, right: int) -> Any:
    return np.concatenate((np.zeros(left, np.int32), prompt[left + right :], np.zeros(right, np.int32)))


def beams(count: int, **options: Any) -> Scenario:
    return lambda model: alone(model, num_beams=count, **options)


def beams_of_a_batch(model: Any) -> Tokens:
    running = generator(model, len(PROMPT) + NEW, batch_size=2, num_beams=3)
    running.append_tokens(np.stack((PROMPT, padded(OTHER, 3, 0))))
    return finished(running, 2)


SCENARIOS: dict[str, Scenario] = {
    "greedy": greedy,
    "sampling": sampled,
    "many generators in a row": one_after_another,
    "two generators": side_by_side,
    "rewind": rewound(30),
    "rewind into the prompt": rewound(4),
    "rewind to 0": rewound(0),
    "chunked prefill": in_chunks,
    "batch": batch(PROMPT, OTHER),
    "batch, padded on the left": batch(PROMPT, padded(OTHER, 4, 0)),
    "batch, padded on the right": batch(PROMPT, padded(OTHER, 0, 4)),
    "2 beams": beams(2),
    "4 beams, early stopping": beams(4, early_stopping=True),
    "beams of a padded batch": beams_of_a_batch,
}


@pytest.fixture(scope="module", params=[False, True], ids=["past and present apart", "one buffer"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The original, and its rewrite at 32 bits."""
    root = tmp_path_factory.mktemp("genai")
    original = host_folders.write_original(root / "original", share_buffer=request.param)
    rewritten = host_folders.write_rewritten(original, root / "rewritten", 32)
    if request.param:  # the original's attention can't read a buffer that is longer than its past
        host_folders.write_original(root / "apart")
        original = root / "apart"
    return og.Model(str(original)), og.Model(str(rewritten))


@pytest.mark.parametrize("name", SCENARIOS)
def test_tokens_are_the_originals(models: tuple[Any, Any], name: str) -> None:
    expected, got = (SCENARIOS[name](model) for model in models)
    assert got == expected
    assert len({*expected[-1]}) > 5


def test_later_turns_are_the_originals(tmp_path: Path) -> None:
    """A turn ends with a token that the greedy text has early; the next one is appended to what is there."""
    end = greedy(og.Model(str(host_folders.write_original(tmp_path / "endless"))))[0][len(PROMPT) + 12]
    original = host_folders.write_original(tmp_path / "original", end=end)
    rewritten = host_folders.write_rewritten(original, tmp_path / "rewritten", 32)

    def talk(model: Any) -> Tokens:
        running = generator(model, 120, min_length=0)
        turns = []
        for prompt in (PROMPT, OTHER):
            running.append_tokens(prompt[None])
            turns += finished(running)
        return turns

    expected, got = (talk(og.Model(str(folder))) for folder in (original, rewritten))
    assert got == expected
    assert len(expected[0]) + len(OTHER) < len(expected[1])


def test_the_engine_takes_requests_of_different_length_and_late_ones(models: tuple[Any, Any]) -> None:
    def served(model: Any) -> Tokens:
        engine, tokens = og.Engine(model), list[list[int]]()
        requests, events = list[Any](), engine.create_event_buffer(64)

        def ask(prompt: Any) -> None:
            request = engine.create_request()
            options = og.TurnOptions(request)
            options.set_do_sample(False)
            options.set_max_generated_tokens(NEW)
            options.set_min_generated_tokens(NEW)
            request.begin_turn(prompt, options)
            requests.append(request)
            tokens.append([])

        ask(PROMPT)
        ask(OTHER[:4])
        steps = 0
        while engine.has_pending_requests():
            for event in engine.run(events):
                assert og.EngineErrorCode.NONE.value == int(event.error_code)
                if int(event.flags) & og.EngineEventFlags.TOKEN.value:
                    tokens[requests.index(event.request)].append(event.token)
            steps += 1
            if steps == 5:
                ask(OTHER)
        return tokens

    expected, got = map(served, models)
    assert got == expected
    assert [len(each) for each in expected] == [NEW] * 3


def test_quantized_tokens_are_those_of_our_own_session(quantized: Path) -> None:
    session = kivi.Session(quantized, host="native")
    cache = session.new_cache()
    own = [*session.generate(PROMPT.tolist(), max_new_tokens=NEW, cache=cache)]
    assert alone(og.Model(str(quantized))) == [[*PROMPT.tolist(), *own]]
    assert cache.sealed_tokens > 0
