"""verify tells a sound rewrite from a broken one, and never passes without having quantized something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnx_kivi as kivi


def changed(path: Path, to: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    model = onnx.load(path)
    change(model)
    onnx.save(model, to)
    return to


def set_attribute(model: onnx.ModelProto, name: str, value: str) -> None:
    nodes = [n for n in model.graph.node if n.op_type == "QuantizedKvSdpa"]
    assert nodes
    for node in nodes:
        (attribute,) = (a for a in node.attribute if a.name == name)
        attribute.s = value.encode()


@pytest.mark.parametrize("bits", [32, 8, 4, 2])
def test_sound_rewrites_pass(tiny: Path, rewritten: Callable[[int], Path], bits: int) -> None:
    result = kivi.verify(tiny, rewritten(bits))
    assert result.ok, result.reason
    assert result.max_rel_diff < 1e-4
    if bits < 32:
        assert result.sealed_tokens > 0
        assert result.mean_kl > 0


def test_kl_grows_as_bits_fall(tiny: Path, rewritten: Callable[[int], Path]) -> None:
    kl = [kivi.verify(tiny, rewritten(bits)).mean_kl for bits in (8, 4, 2)]
    assert kl[0] * 10 < kl[1] < kl[2] / 3


def test_wrong_scale_fails_at_32_bits(tiny: Path, rewritten: Callable[[int], Path], tmp_path: Path) -> None:
    path = changed(rewritten(32), tmp_path / "model.onnx", lambda m: set_attribute(m, "scale", "0.26"))
    result = kivi.verify(tiny, path)
    assert not result.ok
    assert "at 32 bits logits differ" in result.reason


def test_wrong_scale_fails_at_8_bits(tiny: Path, rewritten: Callable[[int], Path], tmp_path: Path) -> None:
    path = changed(rewritten(8), tmp_path / "model.onnx", lambda m: set_attribute(m, "scale", "0.5"))
    reason = kivi.verify(tiny, path).reason
    assert "mean KL" in reason
    assert "at 32 bits logits differ" in reason


def test_other_weights_fail(tiny: Path, rewritten: Callable[[int], Path], tmp_path: Path) -> None:
    def negate_one_matrix(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == 1)
        tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))

    path = changed(rewritten(32), tmp_path / "model.onnx", negate_one_matrix)
    assert not kivi.verify(tiny, path).ok


def test_an_original_that_runs_at_no_length_is_said_to_be_one(tiny: Path, tmp_path: Path) -> None:
    def break_logits(model: onnx.ModelProto) -> None:
        (node,) = (n for n in model.graph.node if "logits" in n.output)
        node.output[:] = ["whole" if name == "logits" else name for name in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 3]), "traced"))
        model.graph.node.append(onnx.helper.make_node("Reshape", ["whole", "traced"], ["logits"]))

    original, path = changed(tiny, tmp_path / "original.onnx", break_logits), tmp_path / "model.onnx"
    kivi.save(kivi.rewrite(original, kivi.KiviConfig(8, 8))[0], path)
    with pytest.raises(kivi.UnsupportedModelError, match="expected an original that runs"):
        kivi.verify(original, path)


def test_a_model_that_is_not_rewritten(tiny: Path) -> None:
    with pytest.raises(kivi.UnsupportedModelError, match="expected a rewritten model"):
        kivi.verify(tiny, tiny)


def test_run_that_seals_nothing_fails(tiny: Path, rewritten: Callable[[int], Path]) -> None:
    result = kivi.verify(tiny, rewritten(8), prompt=4, steps=1)
    assert not result.ok
    assert "no token was quantized" in result.reason


def test_nan_logits_fail(tiny: Path, rewritten: Callable[[int], Path], tmp_path: Path) -> None:
    def spoil(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == 1)
        nan = np.full(numpy_helper.to_array(tensor).shape, np.nan, np.float32)
        tensor.CopyFrom(numpy_helper.from_array(nan, tensor.name))

    path = changed(rewritten(32), tmp_path / "model.onnx", spoil)
    result = kivi.verify(tiny, path)
    assert not result.ok
    assert result.max_rel_diff == float("inf")


@pytest.mark.parametrize("name", ["prompt", "steps", "batch"])
def test_numbers_out_of_range(tiny: Path, rewritten: Callable[[int], Path], name: str) -> None:
    change: dict[str, Any] = {name: 0}
    with pytest.raises(kivi.ConfigError, match=f"{name}: expected an integer >= 1"):
        kivi.verify(tiny, rewritten(8), **change)
