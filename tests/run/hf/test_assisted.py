"""Assisted generation: either side ours, and drafts from the prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_models
from onnx_kivi.hf import KiviForCausalLM
from onnx_kivi.run.transformers import PROTOCOL

PROMPT = torch.randint(0, 256, (1, 30), generator=torch.Generator().manual_seed(8)).repeat(1, 2)
NEW = 30
# 4.57 fails without a token that ends; this one is never met.
LOOKUP = {"prompt_lookup_num_tokens": 4, "eos_token_id": 257}


class Counted(KiviForCausalLM):
    """Counts its steps."""

    steps = 0

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.steps += 1
        return super().forward(*arguments, **options)


def seeded(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(PROMPT, max_new_tokens=NEW, **options).tolist()


@pytest.fixture(scope="module")
def assistants(original: Any, dense: KiviForCausalLM) -> dict[str, Any]:
    """A torch model of other weights, which is mostly wrong, and ours of the same, which is mostly right."""
    return {"torch": hf_models.llama(seed=1), "ours": dense, "torch, same": original}


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["torch", "ours", "torch, same"])
def test_an_assistant_changes_no_token(
    name: str, sampled: bool, original: Any, dense: KiviForCausalLM, assistants: dict[str, Any]
) -> None:
    theirs = original if name == "ours" else assistants[name]
    expected = seeded(original, assistant_model=theirs, do_sample=sampled)
    assert seeded(dense, assistant_model=assistants[name], do_sample=sampled) == expected


@pytest.mark.parametrize("sampled", [False, True])
def test_ours_assists_a_torch_model(sampled: bool, original: Any, dense: KiviForCausalLM) -> None:
    expected = seeded(original, assistant_model=original, do_sample=sampled)
    assert seeded(original, assistant_model=dense, do_sample=sampled) == expected


@pytest.mark.parametrize("sampled", [False, True])
def test_drafts_from_the_prompt_change_no_token(sampled: bool, original: Any, dense: KiviForCausalLM) -> None:
    assert seeded(dense, do_sample=sampled, **LOOKUP) == seeded(original, do_sample=sampled, **LOOKUP)


def test_an_assistant_that_is_right_saves_steps(dense: KiviForCausalLM, original: Any) -> None:
    counted = Counted(dense.session, dense.config, dense.generation_config)
    seeded(counted, assistant_model=original)
    assert counted.steps < NEW * 2 / 3


@pytest.mark.parametrize("drafts", ["assistant", "prompt"])
def test_at_8_bits_drafts_change_no_token(drafts: str, quantized: KiviForCausalLM, original: Any) -> None:
    options = {"assistant_model": original} if drafts == "assistant" else LOOKUP
    cache = quantized.new_cache()
    found = seeded(quantized, **options, **{PROTOCOL.cache_name: cache})
    assert cache.cache.sealed_tokens >= 48
    expected = [*quantized.session.generate(PROMPT[0].numpy(), max_new_tokens=NEW)]
    assert found[0][60:] == expected
