"""Sampling, and the generation loop on a decoder that counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnx_kivi.errors import ConfigError, UnsupportedModelError
from onnx_kivi.run.generate import generate
from onnx_kivi.run.sampling import Sampler, Sampling, draw, log_probs


class Counting:
    """Expects the token after the last one it was fed, and records what it was fed."""

    vocabulary = 100

    def __init__(self) -> None:
        self.fed: list[list[int]] = []

    def last(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        self.fed.append(ids[0].tolist())
        return np.eye(self.vocabulary, dtype=np.float32)[ids[:, -1] + 1] * 20


def test_greedy_feeds_the_prompt_once_and_then_single_tokens() -> None:
    decoder = Counting()
    assert list(generate(decoder, [5, 6, 7], max_new_tokens=3)) == [8, 9, 10]
    assert decoder.fed == [[5, 6, 7], [8], [9]]


def test_stop_token_ends_and_is_not_given() -> None:
    assert list(generate(Counting(), [5], max_new_tokens=50, stop_tokens=[9, 70])) == [6, 7, 8]


def test_no_token_is_asked_for_before_the_first_is_wanted() -> None:
    decoder = Counting()
    tokens = generate(decoder, [1], max_new_tokens=2)
    assert decoder.fed == []
    assert next(tokens) == 2
    assert decoder.fed == [[1]]


def test_same_seed_gives_same_tokens() -> None:
    logits = np.random.default_rng(0).standard_normal(50).astype(np.float32)

    def draws(seed: int) -> list[int]:
        random = np.random.default_rng(seed)
        return [draw(logits, Sampling(1.0), random) for _ in range(40)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)
    assert {draw(logits, Sampling(1.0, 0.7), random) for _ in range(300)} == {0, 1}
    assert {draw(logits, Sampling(1.0), random) for _ in range(300)} == {0, 1, 2, 3}
    assert {draw(logits, Sampling(1.0, 0.01), random) for _ in range(20)} == {0}


def test_temperature_sharpens() -> None:
    logits = np.array([1.0, 0.0], np.float32)

    def share(temperature: float) -> float:
        random = np.random.default_rng(0)
        return float(np.mean([draw(logits, Sampling(temperature), random) == 0 for _ in range(500)]))

    # softmax(1 / t): 0.73 at 1, 0.98 at 0.25; 500 draws have a standard error of 0.02.
    assert abs(share(1.0) - 0.731) < 0.08
    assert abs(share(0.25) - 0.982) < 0.03


def draws(logits: npt.NDArray[np.float32], **options: Any) -> set[int]:
    random = np.random.default_rng(0)
    return {draw(logits, Sampling(temperature=1.0, **options), random) for _ in range(300)}


def test_top_k_and_min_p_keep_the_likeliest() -> None:
    logits = np.log(np.array([0.05, 0.5, 0.15, 0.3], np.float32))
    assert draws(logits, top_k=2) == {1, 3}
    assert draws(logits, top_k=9) == {0, 1, 2, 3}
    assert draws(logits, min_p=0.25) == {1, 2, 3}
    assert draws(logits, top_k=3, top_p=0.6) == {1, 3}


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
def test_the_nucleus_of_many_tokens_is_the_fewest_that_reach_top_p(top_p: float) -> None:
    logits = np.random.default_rng(1).standard_normal(300).astype(np.float32) * 3
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    order = np.argsort(-p)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1].tolist())
    random = np.random.default_rng(0)
    drawn = {draw(logits, Sampling(1.0, top_p), random) for _ in range(20000)}
    assert drawn <= nucleus
    assert {token for token in nucleus if p[token] > 1e-3} <= drawn


def test_a_repetition_penalty_counts_the_prompt_and_the_answer() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.2), [0])
    assert [sampler.choose(logits) for _ in range(3)] == [1, 0, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_named(bad: float) -> None:
    with pytest.raises(UnsupportedModelError, match="logits: expected numbers, got"):
        Sampler(Sampling(), [0]).choose(np.array([0.0, bad, 1.0], np.float32))


def test_log_probabilities_are_the_models_own() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    own, top = log_probs(logits, 0, 2)
    assert own == pytest.approx(np.log(0.1), abs=1e-6)
    assert [token for token, _ in top] == [1, 2]
    assert [value for _, value in top] == pytest.approx(np.log([0.6, 0.3]), abs=1e-6)
    assert log_probs(logits, 0, 0)[1] == ()
    assert len(log_probs(logits, 0, 9)[1]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature: expected a number >= 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0.0}, "top_p: expected 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k: expected an integer >= 0"),
        ({"top_k": 2.5}, "top_k"),
        ({"min_p": 1.5}, "min_p: expected 0 <= min_p <= 1"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number > 0"),
        ({"seed": -1}, "seed: expected an integer >= 0"),
    ],
)
def test_bad_sampling_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "ids: expected one prompt of at least one token"),
        ([[1], [2]], {}, "ids: expected one prompt"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens: expected an integer >= 0"),
        ([1], {"max_new_tokens": 1.5}, "max_new_tokens: expected an integer >= 0"),
        ([100], {}, "ids: expected integers from 0 to 99, got 100"),
    ],
)
def test_bad_options_are_refused_at_once(ids: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(Counting(), ids, **options)
