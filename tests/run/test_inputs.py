"""What generation feeds a model beside tokens: states from zero, and nothing that the caller didn't give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_kivi as kivi
from onnx_kivi.run.session import open_model
from onnx_kivi.run.stepper import Stepper
from tiny_variants import VOCABULARY, with_embeddings, with_state
from zoo import MODELS

PROMPT = [5, 6, 7]


def session_of(path: Path) -> kivi.Session:
    config = kivi.KiviConfig(32, 32, block_tokens=16, residual_length=8, sink_length=2)
    model, _ = kivi.rewrite(path, config, partial=True)
    kivi.save(model, path.with_name("small.onnx"))
    return kivi.Session(path.with_name("small.onnx"))


def test_a_carried_state_starts_at_zero(tiny: Path, tmp_path: Path, rewritten: Callable[[int], Path]) -> None:
    """The state is added to the logits, so any other start would change the tokens."""
    session = session_of(with_state(tiny, tmp_path))
    assert "past_state" in {i.name for i in session.get_inputs()}
    expected = list(kivi.Session(rewritten(32)).generate(PROMPT, max_new_tokens=8))
    assert list(session.generate(PROMPT, max_new_tokens=8)) == expected
    push = np.zeros((1, 1, VOCABULARY), np.float32)
    push[..., 3] = 1
    assert list(session.generate(PROMPT, max_new_tokens=2, inputs={"past_state": push})) == [3, 3]


def test_embeddings_are_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    session = session_of(with_embeddings(tiny, tmp_path))
    message = "input inputs_embeds: expected a model that takes input_ids, .* Session.run"
    with pytest.raises(kivi.UnsupportedModelError, match=message):
        next(session.generate(PROMPT))


def test_an_encoder_is_never_made_up() -> None:
    stepper = Stepper(open_model(MODELS["optimum/bart/decoder_with_past_model"]))
    with pytest.raises(kivi.UnsupportedModelError, match=r"input encoder_attention_mask: .* one of its `inputs`"):
        stepper.step(np.array([[2]]))
    stepper = Stepper(
        open_model(MODELS["optimum/bart/decoder_with_past_model"]),
        given={"encoder_attention_mask": np.ones((1, 5), np.int64)},
    )
    with pytest.raises(kivi.UnsupportedModelError, match=r"input past_key_values\.0\.encoder\.key: .* `inputs`"):
        stepper.step(np.array([[2]]))


@pytest.mark.parametrize("name", ["encoder_mask", "input_ids", "position_ids", "attention_mask", "past_length"])
def test_inputs_that_the_model_has_not_or_tokens_fill_are_refused_by_name(
    rewritten: Callable[[int], Path], name: str
) -> None:
    session = kivi.Session(rewritten(8))
    with pytest.raises(kivi.ConfigError, match=f"inputs: expected .* got {name}"):
        session.generate(PROMPT, inputs={name: np.ones((1, 3), np.int64)})


@pytest.mark.parametrize(
    ("ids", "got"), [([1, -1], "-1"), ([1.0, 1.5], "float64"), ([3, VOCABULARY], "256"), ([True, False], "bool")]
)
def test_ids_outside_the_vocabulary_are_refused_before_the_first_token(
    rewritten: Callable[[int], Path], ids: Any, got: str
) -> None:
    session = kivi.Session(rewritten(8))
    with pytest.raises(kivi.ConfigError, match=f"ids: expected integers from 0 to 255, got .*{got}"):
        session.generate(ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"seed": -1}, "seed: expected an integer >= 0"), ({"seed": 1.5}, "seed: expected an integer >= 0")],
)
def test_seeds_are_integers_from_0(rewritten: Callable[[int], Path], options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(kivi.ConfigError, match=message):
        kivi.Session(rewritten(8)).generate(PROMPT, **options)
    with pytest.raises(kivi.ConfigError, match=message):
        kivi.verify(rewritten(8), rewritten(8), **options)
