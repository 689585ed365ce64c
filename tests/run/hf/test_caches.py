"""KiviCache: what generate() does with it between calls, and what users do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_models
import onnx_kivi as kivi
from onnx_kivi.hf import KiviCache, KiviForCausalLM
from onnx_kivi.run.transformers import PROTOCOL

NAME = PROTOCOL.cache_name
PROMPT = torch.randint(0, 256, (1, 40), generator=torch.Generator().manual_seed(5))
TURN = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(6))


def turns(model: Any, cache: Any, **options: Any) -> torch.Tensor:
    """Two turns of a conversation on one cache."""
    first = model.generate(PROMPT, max_new_tokens=12, **{NAME: cache}, **options)
    return model.generate(torch.cat([first, TURN], 1), max_new_tokens=12, **{NAME: cache}, **options)


def test_a_second_turn_goes_on_from_the_first(original: Any, dense: KiviForCausalLM) -> None:
    cache = dense.new_cache()
    assert turns(dense, cache).tolist() == turns(original, DynamicCache()).tolist()
    assert cache.get_seq_length() == 40 + 12 + 9 + 12 - 1


def test_a_second_turn_at_8_bits_is_the_sessions(quantized: KiviForCausalLM, replay: hf_models.Replay) -> None:
    cache = quantized.new_cache()
    found = turns(quantized, cache)
    assert cache.cache.sealed_tokens >= 48
    replay.cuts = (*range(40, 52), 61)
    assert turns(replay, None, use_cache=False).tolist() == found.tolist()


def test_a_copied_prompt_has_two_futures(original: Any, dense: KiviForCausalLM) -> None:
    prompt = dense(PROMPT)[NAME]
    for seed in (1, 2):
        ids = torch.cat([PROMPT, torch.randint(0, 256, (1, 5), generator=torch.Generator().manual_seed(seed))], 1)
        found = dense.generate(ids, max_new_tokens=12, **{NAME: copy.deepcopy(prompt)})
        assert found.tolist() == original.generate(ids, max_new_tokens=12).tolist()
    assert prompt.get_seq_length() == 40


def test_the_rows_of_a_prompt_are_repeated_for_beams(original: Any, dense: KiviForCausalLM) -> None:
    prompt = dense(PROMPT)[NAME]
    prompt.batch_repeat_interleave(3)
    ids = torch.cat([PROMPT, TURN], 1)
    found = dense.generate(ids, num_beams=3, max_new_tokens=12, **{NAME: prompt})
    assert found.tolist() == original.generate(ids, num_beams=3, max_new_tokens=12).tolist()


def test_rows_are_selected(original: Any, dense: KiviForCausalLM) -> None:
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    cache = dense(ids)[NAME]
    cache.batch_select_indices(torch.tensor([1]))
    logits = dense(TURN, **{NAME: cache}).logits
    expected = original(torch.cat([ids[1:], TURN], 1)).logits[:, 40:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_a_saved_cache_goes_on(dense: KiviForCausalLM, original: Any, tmp_path: Path) -> None:
    dense(PROMPT)[NAME].cache.save(tmp_path / "prompt.kivi")
    cache = KiviCache(dense.session.load_cache(tmp_path / "prompt.kivi"))
    cache.batch_repeat_interleave(2)
    ids = torch.cat([PROMPT, TURN], 1)
    found = dense.generate(ids, max_new_tokens=12, num_beams=2, **{NAME: cache})
    assert found.tolist() == original.generate(ids, max_new_tokens=12, num_beams=2).tolist()


@pytest.mark.parametrize("tokens", [-3, -40, 1, 37, 40, 50, 0])
def test_crop_means_what_it_means_for_transformers_own_cache(
    tokens: int, original: Any, dense: KiviForCausalLM
) -> None:
    theirs, ours = original(PROMPT)[NAME], dense(PROMPT)[NAME]
    ours.crop(tokens)
    try:
        theirs.crop(tokens)
    except ValueError:
        assert ours.get_seq_length() == min(tokens, 40)  # newer versions refuse to be told what to keep
    else:
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_a_reset_cache_starts_over(dense: KiviForCausalLM) -> None:
    cache = dense(PROMPT)[NAME]
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(dense(PROMPT, **{NAME: cache}).logits, dense(PROMPT).logits)


def test_a_cache_is_freed_with_its_last_reference(dense: KiviForCausalLM) -> None:
    handle = dense(PROMPT)[NAME].cache.handle
    with pytest.raises(kivi.CacheError):
        dense.session.backend.length(handle)
