"""optimum's ORTModelForCausalLM runs a rewritten folder as it ran the original: the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from optimum.onnxruntime import ORTModelForCausalLM

import onnx_kivi as kivi

PROMPT = torch.tensor([[5, 143, 98, 77, 3, 200, 41, 9, 66]])
OTHER = torch.tensor([[17, 230, 8, 91, 155, 12, 60, 101, 33]])
BOTH = torch.cat((PROMPT, OTHER))
NEW = 50
# Logits of size ten, computed in another order.
ROUNDING = 2e-4

Result = list[Any]
Scenario = Callable[[Any], Any]


def opened(folder: Path, **options: Any) -> Any:
    session_options = ort.SessionOptions()
    session_options.log_severity_level = 4
    session_options.intra_op_num_threads = 1
    session_options.register_custom_ops_library(kivi.library_path())
    return ORTModelForCausalLM.from_pretrained(folder, session_options=session_options, **options)


@pytest.fixture(scope="module", params=[False, True], ids=["", "IO binding"])
def models(request: pytest.FixtureRequest, original: Path, dense: Path) -> tuple[Any, Any]:
    """The original, and its rewrite at 32 bits."""
    return opened(original, use_io_binding=request.param), opened(dense, use_io_binding=request.param)


def generated(ids: Any = PROMPT, mask: Any = None, **options: Any) -> Scenario:
    def run(model: Any) -> Any:
        torch.manual_seed(3)
        lengths = {"min_new_tokens": NEW, "max_new_tokens": NEW, "do_sample": False}
        attention = torch.ones_like(ids) if mask is None else mask
        return model.generate(ids, attention_mask=attention, **lengths | options).tolist()

    return run


def padding(left: int) -> Any:
    mask = torch.ones_like(BOTH)
    mask[1, :left] = 0
    return mask


SAMPLED = {"do_sample": True, "top_k": 20, "temperature": 1.5}
SCENARIOS: dict[str, Scenario] = {
    "greedy": generated(),
    "sampling": generated(**SAMPLED),
    "several sequences": generated(num_return_sequences=3, **SAMPLED),
    "2 beams": generated(num_beams=2),
    "4 beams, early stopping": generated(num_beams=4, early_stopping=True, num_return_sequences=2),
    "beam sampling": generated(num_beams=3, **SAMPLED),
    "batch": generated(BOTH),
    "batch, padded on the left": generated(BOTH, padding(4)),
    "beams of a padded batch": generated(BOTH, padding(4), num_beams=3),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_tokens_are_the_originals(models: tuple[Any, Any], name: str) -> None:
    expected, got = (SCENARIOS[name](model) for model in models)
    assert got == expected
    assert len({*expected[-1]}) > 5


def step(model: Any, ids: Any, past: Any = None, length: int = 0) -> tuple[Any, Any]:
    mask = torch.ones((len(ids), length + ids.shape[1]), dtype=torch.long)
    output = model(input_ids=ids, attention_mask=mask, past_key_values=past)
    return output.logits[:, -1], output.past_key_values


def moved(past: Any, move: Callable[[Any], Any]) -> Any:
    return tuple(tuple(move(side) for side in layer) for layer in past)


def two_futures(model: Any) -> Result:
    """Of one past, one after the other and in turns."""
    _, past = step(model, PROMPT)
    first, one = step(model, OTHER[:, :3], past, 9)
    second, other = step(model, OTHER[:, 3:5], past, 9)
    return [first, second, step(model, OTHER[:, :1], one, 12)[0], step(model, OTHER[:, :1], other, 11)[0]]


def rows_apart_and_joined(model: Any) -> Result:
    """Rows of one past go on alone, and are joined again in another order, with one of another past."""
    _, past = step(model, BOTH)
    apart = [moved(past, lambda side: side[:1].clone()), moved(past, lambda side: side[1:].clone())]
    logits, pasts = zip(*(step(model, OTHER[:, row : row + 1], apart[row], 9) for row in range(2)), strict=True)
    _, third = step(model, torch.cat((OTHER, PROMPT[:, :1]), 1))
    layers = zip(pasts[1], third, pasts[0], strict=True)
    joined = tuple(tuple(map(torch.cat, zip(*layer, strict=True))) for layer in layers)
    return [*logits, step(model, torch.tensor([[7], [8], [9]]), joined, 10)[0]]


def second_turn(model: Any) -> Result:
    """generate() goes on from the past of a call before."""
    made = model.generate(PROMPT, max_new_tokens=30, min_new_tokens=30, return_dict_in_generate=True, do_sample=False)
    longer = torch.cat((made.sequences, OTHER), 1)
    more = model.generate(longer, past_key_values=made.past_key_values, max_new_tokens=20, do_sample=False)
    return [made.sequences.float(), more.float()]


def cut(model: Any) -> Result:
    _, past = step(model, torch.cat((PROMPT, OTHER), 1))
    return [step(model, OTHER[:, :2], moved(past, lambda side: side[:, :, :11].contiguous()), 11)[0]]


@pytest.mark.parametrize("scenario", [two_futures, rows_apart_and_joined, second_turn, cut])
def test_logits_are_the_originals_whatever_becomes_of_pasts(models: tuple[Any, Any], scenario: Scenario) -> None:
    expected, got = (scenario(model) for model in models)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


def test_quantized_tokens_are_those_of_our_own_session(quantized: Path) -> None:
    session = kivi.Session(quantized, host="native")
    cache = session.new_cache()
    own = [*session.generate(PROMPT[0].tolist(), max_new_tokens=NEW, cache=cache)]
    assert generated()(opened(quantized)) == [[*PROMPT[0].tolist(), *own]]
    assert cache.sealed_tokens > 0


def test_a_past_of_the_original_is_refused_in_words(original: Path, quantized: Path) -> None:
    _, past = step(opened(original), PROMPT)
    with pytest.raises(Exception, match="expected what a run of this model wrote there, got other numbers") as refusal:
        step(opened(quantized), OTHER[:, :1], past[:1], 9)
    assert "onnx_kivi CacheError: CacheOpen: past_key, row 0, token 8: " in str(refusal.value)
    assert np.isfinite(step(opened(quantized), OTHER)[0].numpy()).all()
