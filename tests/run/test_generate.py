"""Sampling, and the generation loop on a decoder that counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnx_kivi.errors import ConfigError
from onnx_kivi.run.generate import generate, sample


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
        return [sample(logits, 1.0, 1.0, random) for _ in range(40)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)
    assert {sample(logits, 1.0, 0.7, random) for _ in range(300)} == {0, 1}
    assert {sample(logits, 1.0, 1.0, random) for _ in range(300)} == {0, 1, 2, 3}
    assert {sample(logits, 1.0, 0.01, random) for _ in range(20)} == {0}


def test_temperature_sharpens() -> None:
    logits = np.array([1.0, 0.0], np.float32)

    def share(temperature: float) -> float:
        random = np.random.default_rng(0)
        return float(np.mean([sample(logits, temperature, 1.0, random) == 0 for _ in range(500)]))

    # softmax(1 / t): 0.73 at 1, 0.98 at 0.25; 500 draws have a standard error of 0.02.
    assert abs(share(1.0) - 0.731) < 0.08
    assert abs(share(0.25) - 0.982) < 0.03


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "ids: expected one prompt of at least one token"),
        ([[1], [2]], {}, "ids: expected one prompt"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens: expected an integer >= 0"),
        ([1], {"temperature": -0.5}, "temperature: expected a number >= 0"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p: expected 0 < top_p <= 1"),
        ([1], {"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_options_are_refused_at_once(ids: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(Counting(), ids, **options)
