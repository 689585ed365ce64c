"""from_pretrained: where a model and its configuration come from, and what is refused, in a line each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from transformers import AutoConfig, DynamicCache

import onnx_kivi as kivi
from hf_models import decoder_config, small
from onnx_kivi.hf import KiviForCausalLM
from onnx_kivi.run.transformers import PROTOCOL
from onnx_kivi_models.tiny import tiny_decoder

IDS = torch.arange(12)[None]


@pytest.fixture
def folder(dense_folder: Path, tmp_path: Path) -> Path:
    """A copy of the rewritten folder, to be spoiled."""
    return Path(shutil.copytree(dense_folder, tmp_path / "model"))


def changed(folder: Path, **facts: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    return folder


def refusal(*arguments: Any, **options: Any) -> str:
    """What from_pretrained says, which is one line."""
    with pytest.raises(kivi.KiviError) as caught:
        KiviForCausalLM.from_pretrained(*arguments, **options)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("host", ["native", "python"])
def test_a_folder_a_file_and_a_config_open_the_same_model(host: str, folder: Path, original: Any) -> None:
    expected = original.generate(IDS, max_new_tokens=5).tolist()
    config = AutoConfig.from_pretrained(folder)
    for arguments in ((folder,), (str(folder),), (folder / "model.onnx",), (folder, config), (folder, folder)):
        model = KiviForCausalLM.from_pretrained(*arguments, host=host)
        assert model.session.host == host
        assert model.generate(IDS, max_new_tokens=5).tolist() == expected


def test_what_the_folder_says_of_generation_is_the_default(folder: Path) -> None:
    assert KiviForCausalLM.from_pretrained(folder).generation_config.max_new_tokens is None
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    assert KiviForCausalLM.from_pretrained(folder).generate(IDS).shape == (1, 15)
    (folder / "generation_config.json").unlink()
    assert KiviForCausalLM.from_pretrained(folder).generation_config.pad_token_id == 256


def test_options_reach_the_session(folder: Path) -> None:
    model = KiviForCausalLM.from_pretrained(folder, backend="numpy", providers=["CPUExecutionProvider"])
    assert model.session.backend.name == "numpy"


def test_a_path_that_names_nothing(tmp_path: Path) -> None:
    assert "expected an ONNX file, got nothing there; check the path" in refusal(tmp_path / "absent")
    assert "expected an ONNX file, got nothing there; check the path" in refusal("an-organisation/a-model")


def test_a_model_that_was_not_rewritten(folder: Path) -> None:
    assert "run onnx-kivi rewrite on it first" in refusal(folder / "original.onnx")


def test_a_folder_without_a_config(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder).startswith(f"{folder / 'config.json'}: expected a model's configuration, got nothing there;")
    assert refusal(folder, tmp_path).startswith(f"{tmp_path / 'config.json'}: expected a model's configuration")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"model_type": "no_such"}'])
def test_a_config_that_cannot_be_read(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    assert refusal(folder).startswith(f"{folder / 'config.json'}: expected a file that transformers ")


def test_a_generation_config_that_cannot_be_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    assert refusal(folder).startswith(f"{folder / 'generation_config.json'}: expected a file that transformers ")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"vocab_size": 300}, "vocab_size to fit the model, which has 260, got 300; take"),
        ({"num_hidden_layers": 3}, "num_hidden_layers to fit the model, which has 2, got 3; take"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder to fit the model, which has False, got True; take"),
    ],
)
def test_a_config_that_contradicts_the_model(facts: dict[str, Any], words: str, folder: Path) -> None:
    line = refusal(changed(folder, **facts))
    assert line.startswith(f"{folder / 'config.json'}: expected {words}")
    with pytest.raises(kivi.ConfigError, match=f"^config: expected {words}"):
        KiviForCausalLM.from_pretrained(folder, AutoConfig.from_pretrained(folder))


def test_a_model_that_carries_caches_itself(folder: Path) -> None:
    model = tiny_decoder(decoder_config(), sharpness=1.4)
    shorter = next(node for node in model.graph.node if node.op_type == "Softmax" and "layers.1" in node.name)
    shorter.op_type = "LogSoftmax"
    rewritten, report = kivi.rewrite(model, small(32), partial=True)
    assert len(report.sites) == 1
    onnx.save(rewritten, folder / "model.onnx")
    line = refusal(changed(folder, num_hidden_layers=1))
    assert "expected a model that keeps all its caches, got one that carries past_key_values.1.key" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_ids": None}, r"input_ids: expected \(batch, new tokens\), at least one of each, got none"),
        ({"input_ids": IDS[:, :0]}, r"input_ids: .* got shape \(1, 0\)"),
        ({"input_ids": IDS[0]}, r"input_ids: .* got shape \(12,\)"),
        ({"input_ids": IDS + 250}, "input_ids: expected integers from 0 to 259, got 260"),
        ({"input_ids": IDS - 3}, "input_ids: expected integers from 0 to 259, got -3"),
        ({"attention_mask": IDS[:, :5]}, r"attention_mask: expected .* = \(1, 12\), got \(1, 5\)"),
        ({"attention_mask": torch.ones(1, 1, 12, 12)}, r"attention_mask: expected .* got \(1, 1, 12, 12\)"),
        ({PROTOCOL.cache_name: DynamicCache()}, f"{PROTOCOL.cache_name}: expected a KiviCache, .* got DynamicCache"),
        ({"inputs_embeds": torch.zeros(1, 2, 64)}, "inputs_embeds: expected none, .* use input_ids"),
        ({"output_attentions": True}, "output_attentions: expected none, .* use logits alone"),
        ({"output_hidden_states": True}, "output_hidden_states: expected none, .* use logits alone"),
    ],
)
def test_what_the_model_cannot_take(options: dict[str, Any], words: str, dense: KiviForCausalLM) -> None:
    with pytest.raises(kivi.ConfigError, match=f"^{words}") as caught:
        dense(**({"input_ids": IDS} | options))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({PROTOCOL.cache_name: DynamicCache()}, f"{PROTOCOL.cache_name}: expected a KiviCache, .* got DynamicCache"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions: expected none"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states: expected none"),
        ({"assistant_early_exit": 1}, "assistant_early_exit: expected none, .* use assistant_model"),
    ],
)
def test_what_generate_cannot_do(options: dict[str, Any], words: str, dense: KiviForCausalLM) -> None:
    with pytest.raises(kivi.ConfigError, match=words):
        dense.generate(IDS, max_new_tokens=3, **options)


def test_a_cache_of_another_model_is_refused(dense: KiviForCausalLM, quantized: KiviForCausalLM) -> None:
    cache = dense(IDS)[PROTOCOL.cache_name]
    with pytest.raises(kivi.CacheError, match="model"):
        quantized(IDS, **{PROTOCOL.cache_name: cache})


def test_a_cache_of_other_rows_is_refused(dense: KiviForCausalLM) -> None:
    cache = dense(IDS)[PROTOCOL.cache_name]
    with pytest.raises(kivi.CacheError, match=r"expected shape \(B=1, .* got \(2, "):
        dense(IDS.repeat(2, 1), **{PROTOCOL.cache_name: cache})
