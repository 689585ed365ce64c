"""The model called as a module: logits, loss, and every argument that transformers' own takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import onnx_kivi as kivi
from hf_models import one_thread
from onnx_kivi.hf import KiviForCausalLM
from onnx_kivi.run.session import open_model
from onnx_kivi.run.stepper import Stepper
from onnx_kivi.run.transformers import PROTOCOL
from zoo import ZOO

IDS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(4))
RIGHT_PADDED = torch.tensor([[1] * 20, [1] * 14 + [0] * 6])
LEFT_PADDED = RIGHT_PADDED.flip(1)

# Every way in which exporters let a model know positions and lengths.
EXPORTS = (
    "optimum/llama",
    "optimum/gpt2",
    "optimum/opt",
    "optimum/bloom",
    "optimum/gemma2",
    "optimum-fp16/llama",
    "dynamo-23/llama",
    "genai-fp32/llama",
    "genai-fp32/qwen3",
)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Two float32 evaluations of the same sums in another order."""
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-4)


def test_logits_and_loss_are_the_originals(original: Any, dense: KiviForCausalLM) -> None:
    labels = IDS.masked_fill(RIGHT_PADDED == 0, -100)
    found, expected = (model(IDS, attention_mask=RIGHT_PADDED, labels=labels) for model in (dense, original))
    assert_close(found.logits[RIGHT_PADDED == 1], expected.logits[RIGHT_PADDED == 1])
    assert_close(found.loss, expected.loss)


def test_the_loss_of_a_quantized_model_is_that_of_a_prompt(original: Any, quantized: KiviForCausalLM) -> None:
    """Tokens are never quantized in their own step."""
    assert_close(quantized(IDS, labels=IDS).loss, original(IDS, labels=IDS).loss)


def test_a_mask_of_any_type_hides_padding(original: Any, dense: KiviForCausalLM) -> None:
    positions = (LEFT_PADDED.cumsum(1) - 1).clamp(min=0)
    expected = original(IDS, attention_mask=LEFT_PADDED, position_ids=positions).logits[LEFT_PADDED == 1]
    for mask in (LEFT_PADDED, LEFT_PADDED.bool(), LEFT_PADDED.float(), LEFT_PADDED.int()):
        assert_close(dense(IDS, attention_mask=mask).logits[LEFT_PADDED == 1], expected)


def test_positions_are_those_that_are_given(original: Any, dense: KiviForCausalLM) -> None:
    positions = torch.arange(20)[None] * 3
    found, expected = (model(IDS, position_ids=positions).logits for model in (dense, original))
    assert_close(found, expected)
    assert (found - dense(IDS).logits).abs().max() > 0.01


def test_a_long_prompt_of_which_the_last_logits_are_wanted_goes_in_chunks(
    original: Any, dense: KiviForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnx_kivi.run.transformers.model.PREFILL_CHUNK", 8)
    fed: list[int] = []
    run = dense.session.run

    def watched(names: Any, feeds: Any, **more: Any) -> Any:
        fed.append(feeds["input_ids"].shape[1])
        return run(names, feeds, **more)

    monkeypatch.setattr(dense.session, "run", watched)
    positions = (LEFT_PADDED.cumsum(1) - 1).clamp(min=0)
    found, expected = (
        model(IDS, attention_mask=LEFT_PADDED, position_ids=positions, logits_to_keep=3) for model in (dense, original)
    )
    assert_close(found.logits, expected.logits)
    assert fed == [8, 8, 4]
    dense(IDS)
    dense(IDS, logits_to_keep=9)
    assert fed == [8, 8, 4, 20, 20]


def test_a_step_after_a_prompt_sees_it(original: Any, dense: KiviForCausalLM) -> None:
    first = dense(IDS[:, :15])
    second = dense(IDS[:, 15:], **{PROTOCOL.cache_name: first[PROTOCOL.cache_name]})
    assert_close(second.logits, original(IDS).logits[:, 15:])


@pytest.mark.parametrize("kept", [0, 1, 7, torch.tensor([3, 5])])
def test_the_logits_asked_for_are_kept(kept: Any, original: Any, dense: KiviForCausalLM) -> None:
    found, expected = (model(IDS, logits_to_keep=kept).logits for model in (dense, original))
    assert_close(found, expected)


def test_without_a_dict_the_output_is_a_tuple(dense: KiviForCausalLM) -> None:
    loss, logits = dense(IDS, labels=IDS, use_cache=False, return_dict=False)
    assert (loss.shape, logits.shape) == ((), (2, 20, 260))
    assert len(dense(IDS, return_dict=False)) == 2


def test_use_cache_says_whether_a_cache_comes_with_the_output(dense: KiviForCausalLM) -> None:
    assert dense(IDS)[PROTOCOL.cache_name].get_seq_length() == 20
    assert PROTOCOL.cache_name not in dense(IDS, use_cache=False)


def test_it_passes_for_a_module(dense: KiviForCausalLM) -> None:
    assert dense.eval().to("cpu") is dense
    assert dense.device == torch.device("cpu")
    assert [*dense.parameters()] == []
    assert dense.name_or_path


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_of_every_kind_are_fed_what_they_take(name: str, tmp_path: Path) -> None:
    path = ZOO / name / "model.onnx"
    kivi.save(kivi.rewrite(path, kivi.KiviConfig(32, 32))[0], tmp_path / "model.onnx")
    stepper = Stepper(open_model(path), facts=kivi.inspect(path).cache_facts)
    config = LlamaConfig(vocab_size=stepper.vocabulary, num_hidden_layers=2)
    model = KiviForCausalLM.from_pretrained(tmp_path, config, sess_options=one_thread())
    ids, mask, cache = IDS % stepper.vocabulary, LEFT_PADDED, None
    if "genai" in name:  # its GroupQueryAttention takes no padding before the prompt, and no chunk of several rows
        ids, mask = ids[:1], torch.ones_like(ids[:1])
    for start, end in ((0, 15), (15, 17), (17, 18), (18, 19)):
        found = model(ids[:, start:end], attention_mask=mask[:, :end], **{PROTOCOL.cache_name: cache})
        expected = stepper.step(ids[:, start:end].numpy(), mask[:, :end].numpy())
        real = mask[:, start:end].numpy() == 1
        tolerance = 2e-2 if "fp16" in name else 1e-4
        np.testing.assert_allclose(found.logits.numpy()[real], expected[real], rtol=0, atol=tolerance)
        cache = found[PROTOCOL.cache_name]
