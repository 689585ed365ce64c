"""rewrite --last-logits: the input num_logits_to_keep, whatever makes the logits, and models that can't have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_kivi as kivi
from onnx_kivi.measure.synthetic import synthetic_stepper
from onnx_kivi.run.stepper import Stepper
from zoo import MODELS

ROUNDING = 1e-5
IDS = np.random.default_rng(2).integers(3, 60, (2, 12))
ENDS = ("llama", "gemma2", "bart/decoder_with_past_model", "gptj")


def rewritten(model: Any, folder: Path) -> Path:
    config = kivi.KiviConfig(32, 32, last_logits=True)
    kivi.save(kivi.rewrite(model, config)[0], folder / "kept.onnx")
    return folder / "kept.onnx"


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("optimum/") and name.endswith(ENDS)])
def test_the_last_logits_are_those_of_all(name: str, tmp_path: Path) -> None:
    session = kivi.Session(rewritten(MODELS[name], tmp_path))
    every, some, more = (
        synthetic_stepper(session, session.new_cache(), batch=2).step(IDS, keep=keep) for keep in (0, 3, 100)
    )
    assert (every.shape[1], some.shape[1], more.shape[1]) == (12, 3, 12)
    np.testing.assert_allclose(some, every[:, -3:], atol=ROUNDING * float(np.ptp(every)))
    np.testing.assert_allclose(more, every, atol=ROUNDING * float(np.ptp(every)))


def test_without_the_input_a_run_gives_all(tiny: Path, tmp_path: Path) -> None:
    session = kivi.Session(rewritten(tiny, tmp_path))
    assert Stepper(session, session.new_cache()).step(IDS).shape[1] == 12
    assert "num_logits_to_keep" in {i.name for i in session.get_overridable_initializers()}


def test_a_prompt_is_asked_for_its_last_logits_alone(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = kivi.Session(rewritten(tiny, tmp_path))
    whole = Stepper(session, session.new_cache()).step(IDS[:1])[:, -1]
    stepper = Stepper(session, session.new_cache(), prefill_chunk=8)
    shapes: list[tuple[int, ...]] = []
    step = stepper.step

    def watched(*args: Any, **more: Any) -> Any:
        logits = step(*args, **more)
        shapes.append(logits.shape[:2])
        return logits

    monkeypatch.setattr(stepper, "step", watched)
    np.testing.assert_allclose(stepper.last(IDS[:1]), whole, atol=ROUNDING * float(np.ptp(whole)))
    assert shapes == [(1, 1), (1, 1)]


def test_a_model_that_has_the_input_gets_no_other(tiny: Path, tmp_path: Path) -> None:
    session = kivi.Session(rewritten(with_input(tiny), tmp_path))
    assert "num_logits_to_keep" not in {i.name for i in session.get_overridable_initializers()}
    stepper = Stepper(session, session.new_cache())
    assert stepper.step(IDS).shape[1] == 12
    assert stepper.step(IDS, keep=2).shape[1] == 2


def with_input(tiny: Path) -> onnx.ModelProto:
    """The tiny decoder as some exporters write it: an input of one number, and logits that are cut by it."""
    model = onnx.load(tiny)
    head = last(model)
    head.output[:] = ["all"]
    model.graph.input.append(helper.make_tensor_value_info("num_logits_to_keep", onnx.TensorProto.INT64, [1]))
    for name, value in (("z", 1 << 31), ("a", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
    model.graph.node.append(helper.make_node("Neg", ["num_logits_to_keep"], ["minus"]))
    model.graph.node.append(helper.make_node("Slice", ["all", "minus", "z", "a"], ["logits"]))
    return model


def last(model: onnx.ModelProto) -> onnx.NodeProto:
    node: onnx.NodeProto
    (node,) = (each for each in model.graph.node if "logits" in each.output)
    return node


def mixes_tokens(model: onnx.ModelProto) -> None:
    last(model).output[:] = ["each"]
    model.graph.node.append(helper.make_node("Softmax", ["each"], ["logits"], axis=1))


def adds_to_one_token(model: onnx.ModelProto) -> None:
    last(model).output[:] = ["each"]
    twelve = np.zeros((12, 1), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(twelve, "per_token"))
    model.graph.node.append(helper.make_node("Add", ["each", "per_token"], ["logits"]))


def is_read_twice(model: onnx.ModelProto) -> None:
    last(model).output[:] = ["each"]
    model.graph.node.append(helper.make_node("Tanh", ["each"], ["logits"]))
    model.graph.node.append(helper.make_node("Identity", ["each"], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", onnx.TensorProto.FLOAT, None))


def has_another_name(model: onnx.ModelProto) -> None:
    last(model).output[:] = ["scores"]
    (output,) = (o for o in model.graph.output if o.name == "logits")
    output.name = "scores"


def has_a_tensor_of_the_name(model: onnx.ModelProto) -> None:
    last(model).output[:] = ["num_logits_to_keep"]
    model.graph.node.append(helper.make_node("Identity", ["num_logits_to_keep"], ["logits"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mixes_tokens, "logits: expected to be made by .* got Softmax"),
        (adds_to_one_token, "logits: expected to be made by .* got Add"),
        (is_read_twice, "logits: expected a product with the vocabulary that nothing else reads, got 'each'"),
        (has_another_name, "logits: expected an output of this name"),
        (has_a_tensor_of_the_name, "'num_logits_to_keep': expected no tensor of this name"),
    ],
)
def test_what_is_not_made_of_each_token_by_itself_is_refused(
    change: Callable[[onnx.ModelProto], None], message: str, tiny: Path
) -> None:
    model = onnx.load(tiny)
    change(model)
    with pytest.raises(kivi.UnsupportedModelError, match=message):
        kivi.rewrite(model, kivi.KiviConfig(last_logits=True))
    kivi.rewrite(model)
