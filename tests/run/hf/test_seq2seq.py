"""KiviForSeq2SeqLM: generate() of encoder-decoders gives what transformers' own gives, and refuses in one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import hf_seq2seq
import onnx_kivi as kivi
from hf_models import one_thread
from hf_seq2seq import NAMES, SPEECH, prompts
from onnx_kivi.hf import KiviForSeq2SeqLM
from onnx_kivi.run.transformers import PROTOCOL
from zoo import MODELS

TEXT = [name for name in NAMES if name != SPEECH]
NEW = 12
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "without a cache": {"use_cache": False},
    "drafts from the prompt": {"prompt_lookup_num_tokens": 3, "eos_token_id": 103},
}
# transformers 4's M2M100 draws a number per layer, dropped or not.
DRAWS = {("m2m100", way) for way, options in WAYS.items() if "do_sample" in options}
Made = dict[str, tuple[Any, KiviForSeq2SeqLM]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """By name: transformers' own, and ours, exact."""
    torch.set_num_threads(1)
    return {
        name: (
            hf_seq2seq.original(name),
            KiviForSeq2SeqLM.from_pretrained(
                hf_seq2seq.write_folder(tmp_path_factory.mktemp(name), name, 32), sess_options=one_thread()
            ),
        )
        for name in NAMES
    }


def generated(model: Any, name: str, rows: int = 2, **options: Any) -> list[list[int]]:
    torch.manual_seed(9)
    return [*model.generate(**prompts(name, rows), max_new_tokens=NEW, **options).tolist()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_texts_are_the_originals(way: str, name: str, pairs: Made) -> None:
    original, ours = pairs[name]
    if (name, way) in DRAWS and transformers.__version__ < "5":
        pytest.skip("transformers' own model draws random numbers too")
    rows = 1 if "drafts" in way else 2
    found = generated(ours, name, rows, **WAYS[way])
    assert found == generated(original, name, rows, **WAYS[way])
    assert len({*map(tuple, found)}) >= min(2, len(found))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_originals(name: str, pairs: Made) -> None:
    asked = {"output_scores": True, "return_dict_in_generate": True, "max_new_tokens": NEW}
    theirs, ours = (model.generate(**prompts(name, 2), **asked) for model in pairs[name])
    assert len(theirs.scores) == NEW
    for expected, found in zip(theirs.scores, ours.scores, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # logits of some tens, float32 in another order


@pytest.mark.parametrize("name", NAMES)
def test_labels_give_the_originals_loss(name: str, pairs: Made) -> None:
    labels = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(2))
    labels[0, 6:] = -100
    theirs, ours = (model(**prompts(name, 2), labels=labels) for model in pairs[name])
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", TEXT)
def test_a_prompt_for_the_decoder_is_taken_at_once(name: str, pairs: Made) -> None:
    begun = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    original, ours = pairs[name]
    assert generated(ours, name, decoder_input_ids=begun) == generated(original, name, decoder_input_ids=begun)


def test_a_copied_cache_has_two_futures_and_needs_no_encoder(pairs: Made) -> None:
    original, ours = pairs["bart"]
    given = prompts("bart", 1)
    begun = torch.tensor([[1, 5, 9]])
    cache = ours(**given, decoder_input_ids=begun)[PROTOCOL.cache_name]
    for token in (7, 8):
        new = torch.tensor([[token]])
        held = {PROTOCOL.cache_name: copy.deepcopy(cache), "attention_mask": given["attention_mask"]}
        expected = original(**given, decoder_input_ids=torch.cat([begun, new], 1)).logits[:, -1:]
        torch.testing.assert_close(ours(decoder_input_ids=new, **held).logits, expected, rtol=0, atol=1e-3)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("name", NAMES)
def test_at_8_bits_texts_are_the_sessions(name: str, tmp_path: Path) -> None:
    model = KiviForSeq2SeqLM.from_pretrained(hf_seq2seq.write_folder(tmp_path, name, 8), sess_options=one_thread())
    given, cache = prompts(name, 1), model.new_cache()
    found = model.generate(**given, max_new_tokens=30, **{PROTOCOL.cache_name: cache})[0].tolist()
    assert cache.cache.sealed_tokens > 0
    states = model.encoder(**given).last_hidden_state.numpy()
    inputs = {"encoder_hidden_states": states}
    if name != SPEECH:
        inputs["encoder_attention_mask"] = given["attention_mask"].numpy()
    start = model.config.decoder_start_token_id
    expected = [start, *model.session.generate([start], max_new_tokens=30, inputs=inputs)]
    assert found == (expected[-len(found) :] if name == SPEECH else expected)


def test_a_folder_of_transformers_js_is_opened(pairs: Made, tmp_path: Path) -> None:
    folder = hf_seq2seq.write_folder(tmp_path, "t5", 32)
    (folder / "onnx").mkdir()
    for file in folder.glob("*.onnx"):
        file.rename(folder / "onnx" / file.name)
    assert generated(KiviForSeq2SeqLM.from_pretrained(folder), "t5") == generated(pairs["t5"][0], "t5")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A rewritten folder of bart, to be spoiled."""
    return hf_seq2seq.write_folder(tmp_path, "bart", 32)


def refusal(folder: Path) -> str:
    with pytest.raises(kivi.KiviError) as caught:
        KiviForSeq2SeqLM.from_pretrained(folder)
    (line,) = str(caught.value).splitlines()
    return line


def changed(**facts: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | facts))

    return change


def without_cross(folder: Path) -> None:
    hf_seq2seq.write_folder(folder, "bart", 32, cross=False)


def not_rewritten(folder: Path) -> None:
    (folder / "decoder_model_merged.onnx").unlink()
    shutil.copy(MODELS["optimum/bart/decoder_model_merged"], folder / "decoder_model_merged.onnx")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no decoder": (lambda f: (f / "decoder_model_merged.onnx").unlink(), "decoder_model_merged.onnx: expected encoder"),
    "no encoder": (
        lambda f: (f / "encoder_model.onnx").unlink(),
        "encoder_model.onnx: expected encoder_model.onnx and",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: expected a model's configuration, got nothing"),
    "another number of layers": (
        changed(decoder_layers=3),
        "expected decoder_layers to fit the model, which has 2, got 3",
    ),
    "another vocabulary": (changed(vocab_size=99), "expected vocab_size to fit the model, which has 104, got 99"),
    "without --cross": (without_cross, "rewrite decoder_model_merged.onnx with --cross"),
    "not rewritten": (not_rewritten, "run onnx-kivi rewrite on it first"),
    "no encoder in the file": (
        lambda f: (f / "encoder_model.onnx").write_bytes(b"x"),
        "expected a model that onnxruntime",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(case: str, folder: Path) -> None:
    damage, words = DAMAGES[case]
    damage(folder)
    assert words in refusal(folder)


def test_a_config_of_a_decoder_alone_is_refused(folder: Path, dense_folder: Path) -> None:
    shutil.copy(dense_folder / "config.json", folder)
    assert "expected is_encoder_decoder to fit the model, which has True, got False" in refusal(folder)


IDS = torch.tensor([[1, 5, 9]])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decoder_input_ids": None}, r"decoder_input_ids: expected \(batch, new tokens\), .* got none"),
        ({"decoder_input_ids": IDS + 100}, "decoder_input_ids: expected integers from 0 to 103, got 105"),
        ({"decoder_attention_mask": torch.tensor([[0, 1, 1]])}, "decoder_attention_mask: expected no padding"),
        ({"input_ids": None}, "input_ids: expected what the encoder takes, got none"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask: expected .* = \(1, 20\), got \(1, 3\)"),
        ({"encoder_outputs": (torch.zeros(2, 20, 32),)}, r"encoder_outputs: expected states .* of 1 rows, got shape"),
        ({PROTOCOL.cache_name: DynamicCache()}, "expected a KiviCache, .* got DynamicCache"),
        ({"output_attentions": True}, "output_attentions: expected none"),
        (
            {"decoder_inputs_embeds": torch.zeros(1, 3, 32)},
            "decoder_inputs_embeds: expected none",
        ),
    ],
)
def test_what_the_model_cannot_take(options: dict[str, Any], words: str, pairs: Made) -> None:
    with pytest.raises(kivi.ConfigError, match=words) as caught:
        pairs["bart"][1](**({**prompts("bart", 1), "decoder_input_ids": IDS} | options))
    assert len(str(caught.value).splitlines()) == 1
