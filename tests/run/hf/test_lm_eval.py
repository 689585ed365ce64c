"""lm-eval's harness on a task of its own making: choices by likelihood, and texts by generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnx_kivi.hf import KiviForCausalLM

lm_eval = pytest.importorskip("lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

DATASET = """dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}, cache_dir: {folder}}}
test_split: test
doc_to_text: question
doc_to_target: right
"""
CHOOSE = """task: choose
output_type: multiple_choice
doc_to_choice: answers
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """task: write
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Any:
    """A manager that knows the two tasks, and nothing that would have to be fetched."""
    questions = [
        {"question": f"The cache of layer {i} holds", "answers": [" keys", " values and keys", " all"], "right": i % 3}
        for i in range(6)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    for name, task in (("choose", CHOOSE), ("write", WRITE)):
        (tmp_path / f"{name}.yaml").write_text(task + DATASET.format(folder=tmp_path))
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tmp_path), include_defaults=False)


def answers(model: Any, tokenizer: Any, tasks: Any, task: str) -> list[Any]:
    """What the harness heard, question by question."""
    from lm_eval.models.huggingface import HFLM

    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=[task],
        task_manager=tasks,
        bootstrap_iters=0,
        log_samples=True,
    )
    return [sample["filtered_resps"] for sample in found["samples"][task]]


def test_likelihoods_are_the_originals(original: Any, dense: KiviForCausalLM, tokenizer: Any, tasks: Any) -> None:
    expected, found = (np.array(answers(model, tokenizer, tasks, "choose")) for model in (original, dense))
    assert found.shape == (6, 3, 2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_texts_are_the_originals(original: Any, dense: KiviForCausalLM, tokenizer: Any, tasks: Any) -> None:
    expected, found = (answers(model, tokenizer, tasks, "write") for model in (original, dense))
    assert len(found) == 6
    assert found == expected
