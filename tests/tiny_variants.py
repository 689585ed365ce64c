"""Tiny decoders that take more than tokens and a growing cache: a state of fixed size, embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

VOCABULARY = 256


def with_state(tiny: Path, folder: Path) -> Path:
    """The tiny decoder with a state of fixed size, which pushes its logits unequally and is handed on."""
    model = onnx.load(tiny)
    graph = model.graph
    (last,) = (node for node in graph.node if "logits" in node.output)
    last.output[:] = ["stateless" if name == "logits" else name for name in last.output]
    graph.initializer.append(onnx.numpy_helper.from_array(1e3 + np.arange(VOCABULARY, dtype=np.float32), "strength"))
    graph.node.append(helper.make_node("Mul", ["past_state", "strength"], ["push"]))
    graph.node.append(helper.make_node("Add", ["stateless", "push"], ["logits"]))
    graph.node.append(helper.make_node("Identity", ["past_state"], ["present_state"]))
    shape: list[str | int | None] = ["batch", 1, VOCABULARY]
    graph.input.append(helper.make_tensor_value_info("past_state", TensorProto.FLOAT, shape))
    graph.output.append(helper.make_tensor_value_info("present_state", TensorProto.FLOAT, shape))
    return saved(model, folder)


def with_embeddings(tiny: Path, folder: Path) -> Path:
    """The tiny decoder without its embedding: it takes inputs_embeds."""
    model = onnx.load(tiny)
    graph = model.graph
    (embedding,) = (n for n in graph.node if n.op_type == "Gather" and "input_ids" in n.input)
    graph.node.remove(embedding)
    names = {embedding.output[0]: "inputs_embeds", "input_ids": "summed"}  # other nodes read the shape of the ids
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "last"))
    graph.node.insert(0, helper.make_node("ReduceSum", ["inputs_embeds", "last"], ["summed"], keepdims=0))
    kept = [i for i in graph.input if i.name != "input_ids"]
    del graph.input[:]
    graph.input.extend(kept)
    graph.input.append(helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, ["batch", "sequence", 64]))
    return saved(model, folder)


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"
