"""Text in, text out: streamers, stop strings, criteria and processors of one's own, pipelines and chat templates."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from onnx_kivi.hf import KiviForCausalLM

ROOT = Path(__file__).parents[3]
PROMPTS = ["Keys and values", "a cache"]
NEW = 12


class Collected(TextStreamer):
    """What a streamer was told."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.texts: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        self.texts.append(text)


class EvenOnly(LogitsProcessor):
    """Forbids every second token."""

    def __call__(self, _: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, -torch.inf)


def after_five(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Stops five tokens after the first prompt."""
    return torch.full((len(input_ids),), input_ids.shape[1] >= len(PROMPTS[0]) + 5)


@pytest.fixture
def both(original: Any, dense: KiviForCausalLM, tokenizer: Any) -> Callable[..., tuple[Any, Any]]:
    """generate() of the original and of ours on the first prompt."""
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt")

    def call(**options: Any) -> tuple[Any, Any]:
        return tuple(m.generate(**inputs, max_new_tokens=NEW, **options).tolist() for m in (original, dense))

    return call


@pytest.fixture
def piped(original: Any, dense: KiviForCausalLM, tokenizer: Any) -> Callable[..., list[Any]]:
    """What the pipeline makes of a prompt with the original, and with ours, from the same random numbers."""

    def call(prompt: Any, **options: Any) -> list[Any]:
        made = []
        for model in (original, dense):
            torch.manual_seed(11)
            made.append(pipeline("text-generation", model=model, tokenizer=tokenizer)(prompt, **options))
        return made

    return call


def test_a_streamer_hears_the_text_bit_by_bit(original: Any, dense: KiviForCausalLM, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt")
    heard = []
    for model in (original, dense):
        streamer = Collected(tokenizer)
        model.generate(**inputs, max_new_tokens=NEW, streamer=streamer)
        heard.append(streamer.texts)
    assert heard[0] == heard[1]
    assert len(heard[1]) > 2


def test_stopping_criteria_stop_it(both: Callable[..., tuple[Any, Any]]) -> None:
    expected, found = both(stopping_criteria=StoppingCriteriaList([after_five]))
    assert found == expected
    assert len(found[0]) == len(PROMPTS[0]) + 5


def test_a_stop_string_stops_it(both: Callable[..., tuple[Any, Any]], tokenizer: Any) -> None:
    whole = both()[1][0]
    expected, found = both(stop_strings=[tokenizer.decode(whole[-6:-5])], tokenizer=tokenizer)
    assert found == expected
    assert len(found[0]) < len(whole)


def test_logits_processors_of_ones_own_choose(both: Callable[..., tuple[Any, Any]]) -> None:
    expected, found = both(logits_processor=LogitsProcessorList([EvenOnly()]))
    assert found == expected
    assert all(token % 2 == 0 for token in found[0][len(PROMPTS[0]) :])


def test_a_prefix_may_allow_tokens(both: Callable[..., tuple[Any, Any]]) -> None:
    expected, found = both(prefix_allowed_tokens_fn=lambda _, ids: [*range(len(ids) % 7, 200, 7)], num_beams=2)
    assert found == expected


@pytest.mark.parametrize("options", [{}, {"do_sample": False}, {"num_beams": 2, "num_return_sequences": 2}])
def test_a_pipeline_gives_the_originals_texts(options: Any, piped: Callable[..., list[Any]]) -> None:
    expected, found = piped(PROMPTS, max_new_tokens=NEW, batch_size=2, **options)
    assert found == expected


def test_a_pipeline_spells_a_chat_by_its_template(piped: Callable[..., list[Any]]) -> None:
    chat = [{"role": "user", "content": "Which cache?"}]
    expected, found = piped(chat, max_new_tokens=NEW)
    assert found == expected
    assert found[0]["generated_text"][:-1] == chat
    assert found[0]["generated_text"][-1]["content"]


def test_the_folders_tokenizer_and_template_feed_it(original: Any, dense_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dense_folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Which cache?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    model = KiviForCausalLM.from_pretrained(dense_folder)
    assert tokenizer.decode(inputs["input_ids"][0]).startswith("<turn>user: Which cache?<turn>assistant: ")
    expected, found = (m.generate(**inputs, max_new_tokens=NEW).tolist() for m in (original, model))
    assert found == expected


def test_the_readmes_example_runs(dense_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(dense_folder, tmp_path / "small")
    monkeypatch.chdir(tmp_path)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (example,) = (e for e in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "KiviForCausalLM" in e)
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["model"].name_or_path == "small"
