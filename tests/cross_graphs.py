"""Decoders of one layer with a self and a cross attention, and what drives them and other encoder-decoders.

`model(**changes)` replaces lines of CROSS_LINES by name; `compared` runs an original and its rewrite on the same tokens
with the encoder fed in the first step only, so that a slot that lost it, or its mask, could not give the same result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

import graphs
import onnx_kivi as kivi
from limits import difference
from onnx_kivi.run.session import quiet_options
from onnx_kivi.runtime.backend import CacheState
from onnx_kivi.spec import CROSS

Array = npt.NDArray[Any]

BLOCK = 4
DENSE = kivi.KiviConfig(32, 32, BLOCK, 64, 0, 0, cross=True)
SMALL = kivi.KiviConfig(8, 8, BLOCK, 64, 0, 0, cross=True)
ENCODER_TOKENS = 11
QUANTIZED = 1e-5  # ten times what rounding changes in these models
KEY, VALUE = "past_0_encoder_key", "past_0_encoder_value"
CROSS_LINES = {
    "turn": "ct = Transpose<perm=[0,1,3,2]>(past_0_encoder_key)",
    "product": "c1 = MatMul(query, ct) c2 = Mul(c1, f(0.4))",
    "mask": "c3 = Add(c2, encoder_mask)",
    "values": "cw = Softmax<axis=-1>(c3) crossed = MatMul(cw, past_0_encoder_value)",
}
CROSS_INPUTS = {
    "encoder_key": "float[B,4,E,8] past_0_encoder_key",
    "encoder_value": "float[B,4,E,8] past_0_encoder_value",
    "encoder_mask": "float[B,1,1,E] encoder_mask",
}
CROSS_OUTPUTS = {"crossed": "float[B,4,S,8] crossed"}


def model(
    *,
    inputs: dict[str, str | None] | None = None,
    outputs: dict[str, str | None] | None = None,
    opset: int = 18,
    **lines: str,
) -> onnx.ModelProto:
    """A decoder with one self and one cross attention; lines of CROSS_LINES may be replaced by name."""
    assert lines.keys() <= CROSS_LINES.keys() | {"more"}
    return graphs.decoder(
        opset=opset,
        domains=', "com.microsoft": 1',
        inputs=CROSS_INPUTS | (inputs or {}),
        outputs=CROSS_OUTPUTS | (outputs or {}),
        values=" ".join((graphs.LINES["values"], *(CROSS_LINES | lines).values())),
    )


def rewritten(model: onnx.ModelProto | Path, folder: Path, config: kivi.KiviConfig) -> Path:
    """The model, rewritten and saved."""
    path = folder / f"model{config.k_bits}.onnx"
    kivi.save(kivi.rewrite(model, config)[0], path)
    return path


def cross_slots(state: CacheState) -> list[Any]:
    """The slots that store what an encoder gave."""
    return [slot for slot in state.slots if slot.attributes.kind == CROSS]


def encoder(proto: onnx.ModelProto, rng: np.random.Generator, tokens: int = ENCODER_TOKENS) -> dict[str, Array]:
    """Random keys and values for the model's inputs."""
    sizes = {"B": graphs.BATCH, "E": tokens}
    out = {}
    for info in proto.graph.input:
        if info.name in (KEY, VALUE):
            shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in info.type.tensor_type.shape.dim]
            out[info.name] = rng.standard_normal(shape, np.float32).astype(graphs.element_of(info))
    return out


def new_tokens(
    proto: onnx.ModelProto, rng: np.random.Generator, past: int, count: int, tokens: int
) -> dict[str, Array]:
    """Random new tokens, the causal mask of the self attention, and a mask that hides encoder tokens 2, 5, 8, ..."""
    (mask,) = (info for info in proto.graph.input if info.name == "encoder_mask")
    sizes = {"B": graphs.BATCH, "S": count, "E": tokens}
    shape = [sizes.get(d.dim_param, 1) for d in mask.type.tensor_type.shape.dim]
    hidden = np.arange(tokens) % 3 == 2
    added = np.issubdtype(graphs.element_of(mask), np.floating)
    values = (np.where(hidden, -1e4, 0) if added else ~hidden).astype(graphs.element_of(mask))
    return graphs.feeds(rng, past, count, graphs.decoder()) | {
        "encoder_mask": np.ascontiguousarray(np.broadcast_to(values, shape))
    }


def compared(proto: onnx.ModelProto, session: kivi.Session, seed: int, tokens: int) -> list[float]:
    """Differences over a prefill, a chunk and single steps; the first one starts over and feeds the encoder."""
    original = ort.InferenceSession(proto.SerializeToString(), quiet_options(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    given = encoder(proto, rng, tokens)
    past = {
        name: np.zeros((graphs.BATCH, graphs.KV_HEADS, 0, 8), np.float32) for name in ("past_0_key", "past_0_value")
    }
    differences, length = [], 0
    for count in graphs.STEPS:
        new = new_tokens(proto, rng, length, count, tokens)
        names = ["out", "crossed", "present_0_key", "present_0_value"]
        out, crossed, *present = original.run(names, new | given | past)
        first = {**given, "past_length": np.zeros(1, np.int64)} if length == 0 else {}
        got = session.run(["out", "crossed"], new | first)
        differences.append(max(difference(a, b) for a, b in zip((out, crossed), got, strict=True)))
        past = dict(zip(past, present, strict=True))
        length += count
    return differences
