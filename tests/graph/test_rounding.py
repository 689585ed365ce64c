"""A model's copy without the rounding of its activations computes the same but for that rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from int8_models import KINDS, dynamic, float32, qdq
from limits import Array, difference
from onnx_kivi.graph import Graph, load, nudged, rounds_activations, unrounded
from onnx_kivi.run.session import open_model
from onnx_kivi.run.stepper import Stepper
from onnx_kivi_models.tiny import tiny_decoder

IDS = np.array([[5, 6, 7, 200, 9]])


def logits(path: Path) -> Array:
    return Stepper(open_model(path)).step(IDS)


def copy_of(path: Path) -> Path:
    model = unrounded(load(path))
    assert model is not None
    assert not rounds_activations(Graph(model))
    onnx.save(model, path.with_name("unrounded.onnx"))
    return path.with_name("unrounded.onnx")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float32"])
def test_a_copy_without_rounding_is_near_the_model(kind: str, tmp_path: Path) -> None:
    path = KINDS[kind](tiny_decoder(sharpness=1.0), tmp_path)
    assert rounds_activations(Graph(load(path)))
    assert 1e-4 < difference(logits(path), logits(copy_of(path))) < 0.2


def test_without_rounding_a_qdq_model_is_the_float_model(tmp_path: Path) -> None:
    (folder := tmp_path / "float").mkdir()
    expected = logits(float32(tiny_decoder(), folder))
    assert difference(expected, logits(copy_of(qdq(tiny_decoder(), tmp_path)))) < 1e-5


def test_onnxruntimes_fused_operators_are_known(tmp_path: Path) -> None:
    path, fused = dynamic(tiny_decoder(), tmp_path), tmp_path / "fused.onnx"
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(fused)
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"} & {n.op_type for n in onnx.load(fused).graph.node}
    expected = logits(copy_of(path))
    assert difference(expected, logits(copy_of(fused))) < 1e-5


def test_what_reads_codes_in_a_way_of_its_own_is_left_alone() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 4])
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, [4, 4])
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        helper.make_node("BitShift", ["codes", "codes"], ["y"], direction="LEFT"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 18)])
    assert unrounded(model) is None


def test_a_nudge_moves_a_model_by_a_rounding(tmp_path: Path) -> None:
    path = float32(tiny_decoder(), tmp_path)
    model = load(path)
    tensor = next(n.output[0] for n in model.graph.node if n.op_type == "MatMul")
    onnx.save(nudged(model, {tensor}), tmp_path / "nudged.onnx")
    assert 0 < difference(logits(path), logits(tmp_path / "nudged.onnx")) < 1e-4
