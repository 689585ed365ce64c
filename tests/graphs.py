"""One-layer decoders written out by hand, line by line, so that a test can change one line and see what that does.

`decoder(**changes)` replaces lines of the template by name (None drops one); `replay` runs an original and its rewrite
on the same tokens. Sizes: batch 2, 4 query heads over 2 kv heads of 8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnxruntime as ort

import onnx_kivi as kivi

BATCH, HEADS, KV_HEADS, SIZE = 2, 4, 2, 8
STEPS = (5, 3, 1, 1)

INPUTS = {
    "query": f"float[B,{HEADS},S,{SIZE}] query",
    "key": f"float[B,{KV_HEADS},S,{SIZE}] key",
    "value": f"float[B,{KV_HEADS},S,{SIZE}] value",
    "mask": "float[B,1,S,T] mask",
    "past_key": f"float[B,{KV_HEADS},P,{SIZE}] past_0_key",
    "past_value": f"float[B,{KV_HEADS},P,{SIZE}] past_0_value",
}
OUTPUTS = {
    "out": f"float[B,{HEADS},S,{SIZE}] out",
    "present_key": f"float[B,{KV_HEADS},T,{SIZE}] present_0_key",
    "present_value": f"float[B,{KV_HEADS},T,{SIZE}] present_0_value",
}
LINES = {
    "join_key": "present_0_key = Concat<axis=2>(past_0_key, key)",
    "join_value": "present_0_value = Concat<axis=2>(past_0_value, value)",
    "repeat_key": "k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) k = Reshape(k6, i(0,4,-1,8))",
    "repeat_value": "v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1)) v = Reshape(v6, i(0,4,-1,8))",
    "transpose": "kt = Transpose<perm=[0,1,3,2]>(k)",
    "product": "scores = MatMul(query, kt)",
    "scale": "scaled = Mul(scores, f(0.3))",
    "mask": "masked = Add(scaled, mask)",
    "softmax": "weights = Softmax<axis=-1>(masked)",
    "guard": "",
    "values": "out = MatMul(weights, v)",
}
ONE_KV_HEAD: dict[str, Any] = {
    "inputs": {
        "key": "float[B,1,S,8] key",
        "value": "float[B,1,S,8] value",
        "past_key": "float[B,1,P,8] past_0_key",
        "past_value": "float[B,1,P,8] past_0_value",
    },
    "outputs": {
        "present_key": "float[B,1,T,8] present_0_key",
        "present_value": "float[B,1,T,8] present_0_value",
    },
    "repeat_key": "k = Identity(present_0_key)",
    "repeat_value": "v = Identity(present_0_value)",
}
SECOND_LAYER: dict[str, Any] = {
    "inputs": {"past_key_1": "float[B,2,P,8] past_1_key", "past_value_1": "float[B,2,P,8] past_1_value"},
    "outputs": {
        "out_1": "float[B,2,S,8] out_1",
        "present_key_1": "float[B,2,T,8] present_1_key",
        "present_value_1": "float[B,2,T,8] present_1_value",
    },
    "guard": """present_1_key = Concat<axis=2>(past_1_key, key) present_1_value = Concat<axis=2>(past_1_value, value)
        turned = Transpose<perm=[0,1,3,2]>(present_1_key) scores_1 = MatMul(key, turned)
        weights_1 = Softmax<axis=AXIS>(scores_1) out_1 = MatMul(weights_1, present_1_value)""",
}
CONSTANT = re.compile(r"\b([if])\(([-+.\de,]+)\)")


def decoder(
    *,
    opset: int = 18,
    inputs: Mapping[str, str | None] | None = None,
    outputs: Mapping[str, str | None] | None = None,
    domains: str = "",
    **lines: str | None,
) -> onnx.ModelProto:
    """The template with these inputs, outputs and lines in the place of those of the same name.

    `i(1,2)` and `f(0.5)` in a line stand for constants: a list of int64, a float scalar (or list).
    """
    unknown = lines.keys() - LINES.keys()
    assert not unknown, f"no such line: {unknown}"
    body = "\n".join(filter(None, (LINES | lines).values()))
    constants: dict[str, str] = {}

    def name(match: re.Match[str]) -> str:
        kind, text = match.groups()
        count = text.count(",") + 1
        size = "" if kind == "f" and count == 1 else f"[{count}]"
        return constants.setdefault(
            f"{'int64' if kind == 'i' else 'float'}{size} %s = {{{text}}}", f"constant_{len(constants)}"
        )

    body = CONSTANT.sub(name, body)
    values = ", ".join(text % name for text, name in constants.items())
    takes, gives = (
        ", ".join(filter(None, (table | dict(changes or {})).values()))
        for table, changes in ((INPUTS, inputs), (OUTPUTS, outputs))
    )
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": {opset}{domains}]> decoder ({takes}) => ({gives}) <{values}> {{ {body} }}'
    )


def two_layers(axis: int) -> onnx.ModelProto:
    """The template with a second attention, without a mask and with as many query as key heads."""
    return decoder(**SECOND_LAYER | {"guard": SECOND_LAYER["guard"].replace("AXIS", str(axis))})


def feeds(rng: np.random.Generator, past: int, count: int, model: onnx.ModelProto) -> dict[str, Any]:
    """Random new tokens and a causal mask (float with -3e38, or bool) for whatever inputs the model has.

    Inputs named seqlens_k, total_length, attention_mask, held, written and write_places say that nothing is padding.
    """
    total = past + count
    sizes = {"B": BATCH, "S": count, "T": total, "P": past}
    unpadded = {
        "seqlens_k": np.full(BATCH, total - 1, np.int32),
        "total_length": np.array(total, np.int32),
        "attention_mask": np.ones((BATCH, total), np.int64),
        "held": np.full(BATCH, total),
        "written": np.full(BATCH, past),
        "write_places": np.arange(past, total),
    }
    out: dict[str, Any] = {}
    seen = np.arange(past + count) <= past + np.arange(count)[:, None]
    for info in model.graph.input:
        if info.name.startswith("past") or info.name in ("cache_handle", "past_length"):
            continue
        if info.name in unpadded:
            out[info.name] = unpadded[info.name]
            continue
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in info.type.tensor_type.shape.dim]
        if info.type.tensor_type.elem_type == onnx.TensorProto.BOOL:
            out[info.name] = np.broadcast_to(seen, shape).copy()
        elif info.name == "mask":
            out[info.name] = np.broadcast_to(np.where(seen, 0, -3e38), shape).astype(np.float32)
        elif info.name == "attention_mask":
            out[info.name] = np.broadcast_to((np.arange(past + count) % 3 != 1).astype(np.int64), shape).copy()
        elif np.issubdtype(element_of(info), np.integer):
            out[info.name] = rng.integers(0, 3, shape).astype(element_of(info))
        else:
            out[info.name] = rng.standard_normal(shape, np.float32).astype(element_of(info))
    return out


def element_of(info: onnx.ValueInfoProto) -> npt.DTypeLike:
    """The numpy type of an input."""
    return onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)


def replay(model: onnx.ModelProto, folder: Path, bits: int = 32) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """(original, rewritten) outputs of prefill, chunk and single steps."""
    path = folder / "rewritten.onnx"
    config = kivi.KiviConfig(bits, bits, block_tokens=4, residual_length=0, sink_length=0)
    kivi.save(kivi.rewrite(model, config)[0], path)
    onnx.checker.check_model(str(path), full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    original = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rewritten = kivi.Session(path)
    rng = np.random.default_rng(0)
    shapes = {
        i.name: [d if isinstance(d, int) else {"B": BATCH}.get(d, 0) for d in i.shape] for i in original.get_inputs()
    }
    elements = {i.name: element_of(i) for i in model.graph.input}
    past = {name: np.zeros(shape, elements[name]) for name, shape in shapes.items() if name.startswith("past")}
    names = [o.name for o in original.get_outputs()]
    results, length = [], 0
    for count in STEPS:
        new = feeds(rng, length, count, model)
        before = dict(zip(names, original.run(None, new | past), strict=True))
        results.append((before["out"], rewritten.run(["out"], new)[0]))
        past = {name: before[name.replace("past", "present")] for name in past}
        length += count
    return results


def half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every float made float16."""
    for info in (*model.graph.input, *model.graph.output):
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            with np.errstate(over="ignore"):  # what is below float16's range becomes -inf
                array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return model
