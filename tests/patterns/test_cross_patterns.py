"""Which attention over an encoder's keys and values `cross` rewrites, to the same result, and which it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_kivi as kivi
from cross_graphs import (
    BLOCK,
    DENSE,
    ENCODER_TOKENS,
    KEY,
    QUANTIZED,
    SMALL,
    VALUE,
    compared,
    cross_slots,
    encoder,
    model,
    new_tokens,
    rewritten,
)
from onnx_kivi.spec import CROSS, STORED_TOKENS

Opener = Callable[[Path], kivi.Session]

MERGED_QUERY = "q1 = Transpose<perm=[0,2,1,3]>(query) q2 = Reshape(q1, i(0,0,32))"
MERGED_RESULT = "m2 = Reshape(m1, i(0,0,4,8)) crossed = Transpose<perm=[0,2,1,3]>(m2)"
NO_LINES = {"turn": "", "product": "", "mask": ""}
BIAS = ",".join(["0.5", "-0.3"] * 16 + ["0"] * 64)

SPELLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "heads repeated": {
        "inputs": {
            "encoder_key": "float[B,2,E,8] past_0_encoder_key",
            "encoder_value": "float[B,2,E,8] past_0_encoder_value",
        },
        "turn": """ck = Unsqueeze(past_0_encoder_key, i(2)) cx = Expand(ck, i(1,1,2,1,1)) cr = Reshape(cx, i(0,4,-1,8))
            ct = Transpose<perm=[0,1,3,2]>(cr)""",
        "values": """cv = Unsqueeze(past_0_encoder_value, i(2)) cy = Expand(cv, i(1,1,2,1,1))
            cz = Reshape(cy, i(0,4,-1,8)) cw = Softmax<axis=-1>(c3) crossed = MatMul(cw, cz)""",
    },
    "keys turned already": {
        "inputs": {"encoder_key": "float[B,4,8,E] past_0_encoder_key"},
        "turn": "ct = Identity(past_0_encoder_key)",
    },
    "float16": {
        "inputs": {"encoder_key": "float16[B,4,E,8] past_0_encoder_key"},
        "turn": "ck = Cast<to=1>(past_0_encoder_key) ct = Transpose<perm=[0,1,3,2]>(ck)",
    },
    "returned as they came": {
        "more": "present_0_encoder_key = Identity(past_0_encoder_key)",
        "outputs": {"encoder_key": "float[B,4,E,8] present_0_encoder_key"},
    },
    "a length that the mask tells": {
        "mask": """size = Shape(past_0_encoder_key) length = Slice(size, i(2), i(3))
            one = ConstantOfShape(length) c0 = Add(c2, one) c3 = Add(c0, encoder_mask)""",
    },
    "padding, zeros and ones": {
        "mask": """seen = Cast<to=9>(encoder_mask) seen4 = Unsqueeze(seen, i(1,2))
            bias = Where(seen4, f(0), f(-3.4028235e38)) c3 = Add(c2, bias)""",
        "inputs": {"encoder_mask": "int64[B,E] encoder_mask"},
    },
    "ai.onnx Attention": {
        "opset": 23,
        **NO_LINES,
        "values": "crossed = Attention(query, past_0_encoder_key, past_0_encoder_value, encoder_mask)",
        "inputs": {"encoder_mask": "float[B,1,S,E] encoder_mask"},
    },
    "MultiHeadAttention": {
        **NO_LINES,
        "values": f"""{MERGED_QUERY} m1 = com.microsoft.MultiHeadAttention<num_heads=4>(
            q2, past_0_encoder_key, past_0_encoder_value, f({BIAS}), , encoder_mask) {MERGED_RESULT}""",
        "inputs": {"encoder_mask": "float[B,1,S,E] encoder_mask"},
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_equal_at_32_bits_and_close_at_8(name: str, tmp_path: Path, open_session: Opener) -> None:
    proto = model(**SPELLINGS[name])
    report = kivi.inspect(proto, cross=True)
    assert not report.misses
    assert sorted(site.kind for site in report.sites) == ["cross", "self"]
    dense = open_session(rewritten(proto, tmp_path, DENSE))
    assert max(compared(proto, dense, 0, ENCODER_TOKENS)) <= 2e-6  # sums of at most 16 products, in another order
    small = open_session(rewritten(proto, tmp_path, SMALL))
    differences = compared(proto, small, 0, ENCODER_TOKENS)
    (slot,) = cross_slots(small.backend.export_state(small.cache.handle))
    assert all(len(row.blocks) == ENCODER_TOKENS // BLOCK for row in slot.rows)
    assert differences[0] <= 2e-6
    assert QUANTIZED < max(differences[1:]) <= 0.02  # a step of 1/255 of the range


def test_the_inputs_stay_with_tokens_of_their_own_and_the_outputs_go() -> None:
    proto = model(**SPELLINGS["returned as they came"])
    result, report = kivi.rewrite(proto, SMALL)
    shapes = {i.name: [d.dim_param for d in i.type.tensor_type.shape.dim] for i in result.graph.input}
    assert shapes[KEY][2] == shapes[VALUE][2] == STORED_TOKENS
    assert shapes["encoder_mask"][3] == "E"
    assert "past_0_key" not in shapes
    assert [o.name for o in result.graph.output] == ["out", "crossed"]
    assert [site.removed_inputs for site in report.sites] == [("past_0_key", "past_0_value"), ()]


def test_without_the_option_they_are_left_as_they_are() -> None:
    proto = model()
    result, report = kivi.rewrite(proto, kivi.KiviConfig())
    assert [site.kind for site in report.sites] == ["self"]
    assert not report.misses
    assert STORED_TOKENS not in str(result.graph.input)


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "keys that grow": (
        {"turn": "ck = Concat<axis=2>(past_0_encoder_key, key4) ct = Transpose<perm=[0,1,3,2]>(ck)"}
        | {"inputs": {"key4": "float[B,4,S,8] key4"}},
        "one cache that grows and one that does not",
    ),
    "keys that change": (
        {
            "more": "present_0_encoder_key = Add(past_0_encoder_key, f(1))",
            "outputs": {"encoder_key": "float[B,4,E,8] present_0_encoder_key"},
        },
        "reads it before it is joined with new tokens",
    ),
    "values of another layer": (
        {
            "inputs": {"encoder_value": "float[B,4,E,8] past_1_encoder_value"},
            "values": "cw = Softmax<axis=-1>(c3) crossed = MatMul(cw, past_1_encoder_value)",
        },
        "caches of different layers: past_0_encoder_key, past_1_encoder_value",
    ),
    "returned as values": (
        {
            "more": "present_0_encoder_value = Identity(past_0_encoder_key)",
            "outputs": {"encoder_key": "float[B,4,E,8] present_0_encoder_value"},
        },
        "is returned as 'present_0_encoder_value'; expected its own",
    ),
    "read elsewhere": (
        {"more": "qt = Transpose<perm=[0,1,3,2]>(query) also = MatMul(past_0_encoder_key, qt)"}
        | {"outputs": {"also": "float[B,4,E,S] also"}},
        "'past_0_encoder_key', which a step leaves empty once the cache is stored, is also read by MatMul 'also'",
    ),
    "keys that are the query as well": (
        {"product": "c1 = MatMul(past_0_encoder_key, ct) c2 = Mul(c1, f(0.4))"}
        | {"outputs": {"crossed": "float[B,4,E,8] crossed"}},
        "'past_0_encoder_key', which a step leaves empty once the cache is stored, is an operand of the attention",
    ),
    "turned keys read elsewhere": (
        {"more": "also = MatMul(key4, ct)", "outputs": {"also": "float[B,4,S,E] also"}}
        | {"inputs": {"key4": "float[B,4,S,8] key4"}},
        "'ct', which a step leaves empty once the cache is stored, is also read by MatMul 'also'",
    ),
    "a length that nothing else tells": (
        {
            "inputs": {"encoder_mask": "float encoder_mask"},
            "mask": """size = Shape(past_0_encoder_key) length = Slice(size, i(2), i(3))
                one = ConstantOfShape(length) c0 = Add(c2, one) c3 = Add(c0, encoder_mask)""",
        },
        "size 'E' of 'past_0_encoder_key' is known from the cache only",
    ),
    "a length that is declared": (
        {"inputs": {"encoder_key": "float[B,4,12,8] past_0_encoder_key"}},
        "declared to hold exactly 12 tokens",
    ),
    "heads of another number": (
        {"inputs": {"encoder_key": "float[B,2,E,8] past_0_encoder_key"}, "mask": "c3 = Identity(c2)"},
        "expected a query of 4 axes, as the keys have, got a number that its shapes do not tell",
    ),
    "softmax over queries": (
        {"values": "cw = Softmax<axis=2>(c3) crossed = MatMul(cw, past_0_encoder_value)"},
        "expected the last axis",
    ),
    "tokens and size exchanged": (
        {
            "turn": "ct = Identity(past_0_encoder_key)",
            "mask": "c3 = Identity(c2)",
            "inputs": {
                "query4": "float[B,4,S,E] query4",
                "encoder_value": "float[B,4,8,E] past_0_encoder_value",
            },
            "product": "c1 = MatMul(query4, ct) c2 = Mul(c1, f(0.4))",
            "outputs": {"crossed": "float[B,4,S,E] crossed"},
        },
        "expected the cache 'past_0_encoder_key' with its tokens on axis -1",
    ),
    "a causal MultiHeadAttention": (
        NO_LINES
        | {
            "values": f"""{MERGED_QUERY} m1 = com.microsoft.MultiHeadAttention<num_heads=4, unidirectional=1>(
                q2, past_0_encoder_key, past_0_encoder_value) {MERGED_RESULT}""",
        },
        "counts positions from 0",
    ),
    "a MultiHeadAttention with the ends of its rows": (
        NO_LINES
        | {
            "inputs": {"ends": "int32[B] ends"},
            "values": f"""{MERGED_QUERY} m1 = com.microsoft.MultiHeadAttention<num_heads=4>(
                q2, past_0_encoder_key, past_0_encoder_value, , ends) {MERGED_RESULT}""",
        },
        "its mask counts tokens of 'past_0_encoder_key', which are not the decoder's",
    ),
    "a MultiHeadAttention that projects keys with a bias": (
        NO_LINES
        | {
            "values": f"""{MERGED_QUERY} m1 = com.microsoft.MultiHeadAttention<num_heads=4>(
                q2, past_0_encoder_key, past_0_encoder_value, f({BIAS[:-1]}1)) {MERGED_RESULT}""",
        },
        "the bias of a projection of what is in the cache already",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    report = kivi.inspect(model(**changes), cross=True)
    assert all(site.kind == "self" and KEY not in site.cache_inputs for site in report.sites)
    assert any(re.search(reason, miss.reason) for miss in report.misses), report


def test_partial_leaves_those_that_miss_as_they_are(tmp_path: Path) -> None:
    proto = model(**NEAR_MISSES["read elsewhere"][0])
    with pytest.raises(kivi.UnsupportedModelError, match="--partial rewrites those alone"):
        kivi.rewrite(proto, DENSE)
    result, _ = kivi.rewrite(proto, DENSE, partial=True)
    assert STORED_TOKENS not in str(result.graph.input)
    assert not any(a.s == CROSS.encode() for node in result.graph.node for a in node.attribute)
    kivi.save(result, tmp_path / "model.onnx")
    session = kivi.Session(tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    new = new_tokens(proto, rng, 0, 2, ENCODER_TOKENS)
    with pytest.raises(ValueError, match=KEY):
        session.run(["crossed"], new)
    assert session.run(["crossed"], new | encoder(proto, rng))[0].any()
