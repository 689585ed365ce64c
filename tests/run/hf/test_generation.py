"""generate(): at 32 bits the tokens of transformers' own model, at 8 bits those of our Session fed step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_models
from onnx_kivi.hf import KiviForCausalLM
from onnx_kivi.run.transformers import PROTOCOL

NEW = 16
END = [*range(20)]  # as tokens are nearly random, one of these ends most texts early
# Two float32 evaluations of the same sums in another order; logits are of order 4.
ROUNDING = 1e-4

SCENARIOS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 40},
    "sampling_several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 2},
    "beams_returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam_sampling": {"num_beams": 3, "do_sample": True},
    "an_end": {"eos_token_id": END, "num_return_sequences": 2, "do_sample": True},
    "processors": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 14, "top_p": 0.9},
}
# What the replay can't be: one row, several tokens at a time, or a prompt of another length.
DENSE_ONLY: dict[str, dict[str, Any]] = {
    "no_cache": {"use_cache": False},
    "chunked_prefill": {"prefill_chunk_size": 7},
    "guidance": {"guidance_scale": 1.5},
    "a_cache_of_another_kind": {"cache_implementation": "static"},
}


def prompt(batch: int, tokens: int = 40) -> dict[str, torch.Tensor]:
    """Random tokens; all rows but the first are padded on the left, each more than the one before."""
    ids = torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 5 * row] = 0
    return {"input_ids": ids.where(mask == 1, 256), "attention_mask": mask}


def generated(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """Sequences, scores and cache, from the same random numbers each time."""
    torch.manual_seed(7)
    wanted: dict[str, Any] = {"max_new_tokens": NEW, "return_dict_in_generate": True, "output_scores": True}
    return model.generate(**inputs, **(wanted | options))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scenario", [*SCENARIOS, *DENSE_ONLY])
def test_dense_generates_what_transformers_own_model_generates(
    scenario: str, batch: int, original: Any, dense: KiviForCausalLM
) -> None:
    options = (SCENARIOS | DENSE_ONLY)[scenario]
    expected, found = (generated(model, prompt(batch), **options) for model in (original, dense))
    assert found.sequences.tolist() == expected.sequences.tolist()
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_quantized_generates_what_the_session_generates_step_by_step(
    scenario: str, quantized: KiviForCausalLM, replay: hf_models.Replay
) -> None:
    inputs = prompt(batch=2)
    replay.cuts = (inputs["input_ids"].shape[1],)
    expected = generated(replay, inputs, use_cache=False, **SCENARIOS[scenario])
    found = generated(quantized, inputs, **SCENARIOS[scenario])
    assert found[PROTOCOL.cache_name].cache.sealed_tokens >= 16
    assert found.sequences.tolist() == expected.sequences.tolist()


def test_quantized_greedy_is_the_sessions_own_generation(quantized: KiviForCausalLM) -> None:
    inputs = prompt(1)
    cache = quantized.new_cache()
    found = quantized.generate(**inputs, max_new_tokens=NEW, **{PROTOCOL.cache_name: cache})
    assert cache.cache.sealed_tokens >= 16
    ids = inputs["input_ids"][0].numpy()
    assert found[0, 40:].tolist() == [*quantized.session.generate(ids, max_new_tokens=NEW)]


def test_quantization_is_seen_in_the_scores(original: Any, quantized: KiviForCausalLM) -> None:
    exact, rounded = (generated(model, prompt(1)) for model in (original, quantized))
    assert (exact.scores[0] - rounded.scores[0]).abs().max() < ROUNDING  # the prompt was not quantized for itself
    assert (exact.scores[1] - rounded.scores[1]).abs().max() > 10 * ROUNDING
