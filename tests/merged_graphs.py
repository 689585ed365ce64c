"""Merged decoders of one layer, written line by line: both branches in an If, as optimum merges them.

`merged(**changes)` replaces lines of THEN_LINES and ELSE_LINES by name (`then_scores=...`, `else_encoder=...`), inputs,
outputs, or the node that is the If; with `encoder=False` it has no cross attention, as decoders alone have none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx.parser

INPUTS = {
    "query": "float[B,4,S,8] query",
    "key": "float[B,4,S,8] key",
    "value": "float[B,4,S,8] value",
    "states": "float[B,E,16] states",
    "past_key": "float[B,4,P,8] past_0_key",
    "past_value": "float[B,4,P,8] past_0_value",
    "encoder_key": "float[B,4,E,8] past_0_encoder_key",
    "encoder_value": "float[B,4,E,8] past_0_encoder_value",
    "flag": "bool[1] use_cache_branch",
}
OUTPUTS = {
    "out": "float[B,4,S,8] out",
    "present_key": "float[B,4,T,8] present_0_key",
    "present_value": "float[B,4,T,8] present_0_value",
    "encoder_key": "float[B,4,E,8] present_0_encoder_key",
    "encoder_value": "float[B,4,E,8] present_0_encoder_value",
}
ENCODERS = ("states", "encoder_key", "encoder_value")
# How a mask is made for the keys `all` and the queries from `past` on, and what is the same in both branches.
COMMON = {
    "query": "projected = MatMul(query, weight)",
    "mask": """size = Shape(projected) count = Gather(size, two) total = Add(past, count)
        rows = Range(past, total, one) columns = Range(zero, total, one)
        tall = Unsqueeze(rows, last) hidden = Greater(columns, tall) mask = Where(hidden, least, nothing)""",
    "scores": """turned = Transpose<perm=[0,1,3,2]>(present_0_key) product = MatMul(projected, turned)
        scores = Add(product, mask)""",
    "self": "weights = Softmax<axis=-1>(scores) attended = MatMul(weights, present_0_value)",
}
CROSS = """crossing = Transpose<perm=[0,1,3,2]>(KEY) weighed = MatMul(attended, crossing)
    shares = Softmax<axis=-1>(weighed) out = MatMul(shares, VALUE)"""
THEN_LINES = {
    "join": """present_0_key = Concat<axis=2>(past_0_key, key) present_0_value = Concat<axis=2>(past_0_value, value)
        held = Shape(past_0_key) past = Gather(held, two)""",
    **COMMON,
    "cross": CROSS.replace("KEY", "past_0_encoder_key").replace("VALUE", "past_0_encoder_value"),
    "encoder": "present_0_encoder_key = Identity(dummy) present_0_encoder_value = Identity(dummy)",
}
ELSE_LINES = {
    "join": "present_0_key = Identity(key) present_0_value = Identity(value) past = Identity(zero)",
    **COMMON,
    "encoder": """key3 = MatMul(states, key_weight) value3 = MatMul(states, value_weight)
        tokens = Shape(query) batch = Gather(tokens, zero) batches = Unsqueeze(batch, first)
        shape = Concat<axis=0>(batches, minus, heads, heads8)
        key4 = Reshape(key3, shape) present_0_encoder_key = Transpose<perm=[0,2,1,3]>(key4)
        value4 = Reshape(value3, shape) present_0_encoder_value = Transpose<perm=[0,2,1,3]>(value4)""",
    "cross": CROSS.replace("KEY", "present_0_encoder_key").replace("VALUE", "present_0_encoder_value"),
}
ALONE = {"cross": "out = Identity(attended)", "encoder": ""}
CONSTANTS = """int64 zero = {0}, int64 one = {1}, int64 two = {2}, int64[1] last = {1}, int64[1] first = {0},
    int64[1] minus = {-1}, int64[1] heads = {4}, int64[1] heads8 = {8}, float least = {-1e9}, float nothing = {0}"""
WEIGHTS = {"weight": (8, 8), "key_weight": (16, 32), "value_weight": (16, 32), "dummy": (0, 4, 1, 8)}


def merged(
    *,
    encoder: bool = True,
    inputs: Mapping[str, str | None] | None = None,
    outputs: Mapping[str, str | None] | None = None,
    change: Callable[[onnx.ModelProto], object] | None = None,
    **lines: str,
) -> onnx.ModelProto:
    """The template with these changes; see the module's docstring. change: what to do to the model at last."""
    parts = {"then": THEN_LINES, "else": ELSE_LINES}
    assert {*lines} <= {f"{branch}_{name}" for branch, known in parts.items() for name in known}
    alone = {} if encoder else ALONE
    gone: dict[str, str | None] = {} if encoder else dict.fromkeys(ENCODERS)
    gives = [text for text in (OUTPUTS | gone | dict(outputs or {})).values() if text]
    branches = {
        f"{branch}_branch": onnx.parser.parse_graph(
            f"{branch} () => ({', '.join(gives)}) {{ "
            + " ".join(lines.get(f"{branch}_{name}", (known | alone)[name]) for name in known)
            + " }"
        )
        for branch, known in parts.items()
    }
    takes = ", ".join(text for text in (INPUTS | gone | dict(inputs or {})).values() if text)
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 18]> merged ({takes}) => ({", ".join(gives)}) <{CONSTANTS}> {{ }}'
    )
    names = [output.name for output in model.graph.output]
    model.graph.node.append(onnx.helper.make_node("If", ["use_cache_branch"], names, name="choice", **branches))
    rng = np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        array = rng.standard_normal(shape, np.float32) / 2
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    if change:
        change(model)
    return model
