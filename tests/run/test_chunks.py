"""Prompts in chunks: where they end, what is asked of the model, and that the result is the whole prompt's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import onnx_kivi as kivi
from onnx_kivi.run.session import open_model
from onnx_kivi.run.stepper import Stepper, chunk_ends

Opener = Callable[[Path], kivi.Session]
Rewritten = Callable[[int], Path]
IDS = np.random.default_rng(3).integers(0, 256, (1, 100))
ROUNDING = 1e-4


@pytest.mark.parametrize(
    ("length", "count", "chunk", "ends"),
    [(0, 7, 8, [7]), (0, 8, 8, [8]), (0, 20, 8, [8, 16, 20]), (5, 20, 8, [3, 11, 19, 20]), (16, 1, 8, [1])],
)
def test_chunks_end_at_multiples_of_the_tokens_held(length: int, count: int, chunk: int, ends: list[int]) -> None:
    assert chunk_ends(length, count, chunk) == ends


def test_at_32_bits_chunks_give_the_whole_prompts_logits(open_session: Opener, rewritten: Rewritten) -> None:
    session = open_session(rewritten(32))
    whole = Stepper(session, session.new_cache()).step(IDS)[:, -1]
    for chunk in (1, 16, 33):
        got = Stepper(session, session.new_cache(), prefill_chunk=chunk).last(IDS)
        np.testing.assert_allclose(got, whole, atol=ROUNDING)


def test_a_chunk_sees_what_earlier_ones_sealed_rounded(open_session: Opener, rewritten: Rewritten) -> None:
    session = open_session(rewritten(4))
    whole = Stepper(session, session.new_cache()).step(IDS)[:, -1]
    with session.new_cache() as cache:
        got = Stepper(session, cache, prefill_chunk=32).last(IDS)
        assert cache.sealed_tokens == 80
    assert 1e-3 < np.abs(got - whole).max() < 0.5 * np.ptp(whole)


def test_generate_cuts_the_prompt_and_asks_for_one_token(
    open_session: Opener, rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = open_session(rewritten(32))
    fed: list[tuple[int, ...]] = []
    run = session.run

    def watched(names: Any, feeds: dict[str, npt.NDArray[Any]], **more: Any) -> Any:
        fed.append(feeds["input_ids"].shape)
        return run(names, feeds, **more)

    expected = list(session.generate(IDS[0], max_new_tokens=3))
    monkeypatch.setattr(session, "run", watched)
    assert list(session.generate(IDS[0], max_new_tokens=3, prefill_chunk=40)) == expected
    assert fed == [(1, 40), (1, 40), (1, 20), (1, 1), (1, 1)]


def test_an_original_is_fed_all_at_once(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = Stepper(open_model(tiny), prefill_chunk=8)
    steps: list[int] = []
    step = stepper.step

    def watched(ids: npt.NDArray[np.int64], **more: Any) -> npt.NDArray[np.float32]:
        steps.append(ids.shape[1])
        return step(ids, **more)

    monkeypatch.setattr(stepper, "step", watched)
    stepper.last(IDS)
    assert steps == [100]


@pytest.mark.parametrize("chunk", [0, -1, 1.5])
def test_a_chunk_that_is_no_number_of_tokens_is_refused(rewritten: Rewritten, chunk: Any) -> None:
    session = kivi.Session(rewritten(8))
    with pytest.raises(kivi.ConfigError, match="prefill_chunk: expected an integer >= 1"):
        session.generate(IDS[0], prefill_chunk=chunk)
