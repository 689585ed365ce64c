"""The family `onnx_attention`: ai.onnx Attention with the cache outside or inside gives the original's result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_kivi as kivi
from graphs import decoder, replay

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order
GONE = dict.fromkeys(("repeat_key", "repeat_value", "transpose", "product", "scale", "mask", "softmax"))
SEEN = {"mask": "bool[B,1,S,T] seen"}
INSIDE = GONE | dict.fromkeys(("join_key", "join_value")) | {"inputs": {"mask": None}}
PASTS = "past_0_key, past_0_value"
PRESENTS = "out, present_0_key, present_0_value"

SPELLINGS: dict[str, dict[str, Any]] = {
    "cache outside, boolean mask": GONE
    | {"inputs": SEEN, "values": "out = Attention<scale=0.3>(query, present_0_key, present_0_value, seen)"},
    "cache outside, heads repeated, float mask": {
        **GONE,
        "repeat_key": "k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) k = Reshape(k6, i(0,4,-1,8))",
        "repeat_value": """v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1))
            v = Reshape(v6, i(0,4,-1,8))""",
        "values": "out = Attention(query, k, v, mask)",
    },
    "cache inside, causal": INSIDE
    | {"values": f"{PRESENTS} = Attention<is_causal=1, scale=0.3>(query, key, value, , {PASTS})"},
    "cache inside, mask, softcap": INSIDE
    | {
        "inputs": SEEN,
        "values": f"{PRESENTS} = Attention<softcap=1.5>(query, key, value, seen, {PASTS})",
    },
    "cache inside, merged heads": INSIDE
    | {
        "inputs": {
            "query": "float[B,S,32] query",
            "key": "float[B,S,16] key",
            "value": "float[B,S,16] value",
            "mask": None,
        },
        "outputs": {"out": "float[B,S,32] out"},
        "values": f"{PRESENTS} = Attention<is_causal=1, q_num_heads=4, kv_num_heads=2>(query, key, value, , {PASTS})",
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_give_the_original_s_result(name: str, tmp_path: Path) -> None:
    model = decoder(opset=24, **SPELLINGS[name])
    report = kivi.inspect(model)
    assert not report.misses
    assert report.sites[0].family == "onnx_attention"
    for expected, got in replay(model, tmp_path):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_facts_are_read_off_the_node() -> None:
    site = kivi.inspect(decoder(opset=24, **SPELLINGS["cache inside, causal"])).sites[0]
    assert (site.q_heads, site.kv_heads, site.k_head_size, site.v_head_size) == (4, 2, 8, 8)
    assert site.is_causal
    assert site.nan_to_zero
    assert site.scale == pytest.approx(0.3, rel=1e-7)  # the attribute is a float32


def test_a_row_that_sees_nothing_gives_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spelling = SPELLINGS["cache outside, boolean mask"]
    blind = spelling | {
        "guard": "never = Cast<to=9>(f(0)) nothing = And(seen, never)",
        "values": "out = Attention<scale=0.3>(query, present_0_key, present_0_value, nothing)",
    }
    monkeypatch.setattr("graphs.STEPS", (2,))
    ((expected, got),) = replay(decoder(opset=24, **blind), tmp_path)
    assert not expected.any()
    assert not got.any()


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "causal from 0 over a cache outside": (
        GONE
        | {"inputs": {"mask": None}, "values": "out = Attention<is_causal=1>(query, present_0_key, present_0_value)"},
        "counts positions from 0",
    ),
    "scores as an output": (
        INSIDE
        | {
            "outputs": {"more": "float[B,4,S,T] more"},
            "values": f"{PRESENTS}, more = Attention(query, key, value, , {PASTS})",
        },
        "the scores are an output",
    ),
    "a past without a present": (
        INSIDE
        | {
            "outputs": {"present_key": None, "present_value": None},
            "values": f"out = Attention(query, key, value, , {PASTS})",
        },
        "gives no present keys and values",
    ),
    "values that are no cache": (
        GONE
        | {
            "inputs": {"mask": None, "past_value": None, "other": "float[B,2,T,8] other"},
            "outputs": {"present_value": None},
            "join_value": None,
            "values": "out = Attention(query, present_0_key, other)",
        },
        "expected the values of a cache",
    ),
    "lengths of padding beside a cache outside": (
        GONE
        | {
            "inputs": {"mask": None, "lengths": "int64[B] lengths"},
            "values": "out = Attention(query, present_0_key, present_0_value, , , , lengths)",
        },
        "nonpad_kv_seqlen",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    report = kivi.inspect(decoder(opset=24, **changes))
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report
