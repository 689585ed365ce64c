"""Tiny decoders that round activations to 8 bits as they run, as quantizers write them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

BLOCK = 32


def float32(model: onnx.ModelProto, folder: Path) -> Path:
    """The model as it is."""
    return saved(model, folder)


def int4(model: onnx.ModelProto, folder: Path) -> Path:
    """Weights of MatMul in 4 bits, activations in 8: MatMulNBits at accuracy level 4."""
    graph = model.graph
    weights = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            name = node.input[1]
            packed, scales = _packed(weights[name])
            for suffix, array in ((".q4", packed), (".scales", scales)):
                if not any(t.name == name + suffix for t in graph.initializer):
                    graph.initializer.append(numpy_helper.from_array(array, name + suffix))
            k, n = weights[name].shape
            node.CopyFrom(
                helper.make_node(
                    "MatMulNBits",
                    [node.input[0], f"{name}.q4", f"{name}.scales"],
                    node.output,
                    name=node.name,
                    domain="com.microsoft",
                    **{"K": k, "N": n, "bits": 4, "block_size": BLOCK, "accuracy_level": 4},
                )
            )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return saved(model, folder)


def dynamic(model: onnx.ModelProto, folder: Path) -> Path:
    """onnxruntime's dynamic quantization: DynamicQuantizeLinear and MatMulInteger."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it advises to preprocess the model
    path = saved(model, folder)
    quantize_dynamic(path, folder / "dynamic.onnx", weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
    return folder / "dynamic.onnx"


def qdq(model: onnx.ModelProto, folder: Path) -> Path:
    """Activations through QuantizeLinear and DequantizeLinear in front of each MatMul with weights."""
    graph = model.graph
    weights = {t.name for t in graph.initializer}
    graph.initializer.append(numpy_helper.from_array(np.array(0.05, np.float32), "act_scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(3, np.int8), "act_zero"))
    nodes = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in weights:
            ends = [f"{node.output[0]}.q", f"{node.output[0]}.dq"]
            nodes.append(helper.make_node("QuantizeLinear", [node.input[0], "act_scale", "act_zero"], ends[:1]))
            nodes.append(helper.make_node("DequantizeLinear", [ends[0], "act_scale", "act_zero"], ends[1:]))
            node.input[0] = ends[1]
        nodes.append(node)
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(nodes)
    return saved(model, folder)


KINDS: dict[str, Callable[[onnx.ModelProto, Path], Path]] = {
    "float32": float32,
    "int4": int4,
    "dynamic": dynamic,
    "qdq": qdq,
}


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def _packed(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, blocks, BLOCK / 2) bytes and (N * blocks) scales of a (K, N) matrix; code 8 stands for 0."""
    blocks = weight.T.reshape(weight.shape[1], -1, BLOCK)
    scales = np.abs(blocks).max(-1, keepdims=True) / 7
    codes = np.clip(np.rint(blocks / scales) + 8, 0, 15).astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales.reshape(-1).astype(np.float32)
