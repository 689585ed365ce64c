"""The family `decomposed`: every spelling gives the original's result at 32 bits, every near miss says why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnx_kivi as kivi
from graphs import decoder, replay
from spellings import SPELLINGS

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_give_the_original_s_result(name: str, tmp_path: Path) -> None:
    model = decoder(**SPELLINGS[name])
    report = kivi.inspect(model)
    assert not report.misses
    assert report.sites[0].family == "decomposed"
    for expected, got in replay(model, tmp_path):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_rewriting_at_8_bits_changes_results_once_something_is_sealed(tmp_path: Path) -> None:
    (first, *_, last) = replay(decoder(), tmp_path, bits=8)
    assert np.abs(first[0] - first[1]).max() <= ROUNDING * np.ptp(first[0])
    assert 1e-5 < np.abs(last[0] - last[1]).max() / np.ptp(last[0]) < 0.02


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "softmax over the queries": ({"softmax": "weights = Softmax<axis=2>(masked)"}, "expected the last axis"),
    "heads repeated in turn, not each": (
        {
            "repeat_key": """k5 = Unsqueeze(present_0_key, i(1)) k6 = Expand(k5, i(1,2,1,1,1))
                k = Reshape(k6, i(0,4,-1,8))"""
        },
        "each head repeated for consecutive query heads",
    ),
    "tokens and heads exchanged by a reshape": (
        {
            "repeat_key": """k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1))
                k7 = Reshape(k6, i(0,-1,4,8)) k = Transpose<perm=[0,2,1,3]>(k7)"""
        },
        "not proven to merge or split whole axes",
    ),
    "heads and size exchanged": (
        {
            "inputs": {"query": "float[B,8,S,4] query"},
            "transpose": "kt = Transpose<perm=[0,3,1,2]>(k)",
            "repeat_value": """v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1))
                v7 = Reshape(v6, i(0,4,-1,8)) v = Transpose<perm=[0,3,2,1]>(v7)""",
            "outputs": {"out": "float[B,8,S,4] out"},
        },
        "got another order of axes",
    ),
    "queries against tokens": (
        {"inputs": {"query": "float[B,4,S,T] query"}, "transpose": "kt = Identity(k)"},
        "got another order of axes",
    ),
    "present read by something else": (
        {"guard": "more = ReduceSum(present_0_key)", "outputs": {"more": "float[B] more"}},
        "is also read by ReduceSum",
    ),
    "attention weights as an output": ({"outputs": {"w": "float[B,4,S,T] weights"}}, "do not lead to one MatMul"),
    "attention weights read twice": (
        {"guard": "more = ReduceSum(weights)", "outputs": {"more": "float[B] more"}},
        "are read by ReduceSum",
    ),
    "keys of one layer, values of another": (
        {
            "inputs": {"past_value": "float[B,2,P,8] past_1_value"},
            "join_value": "present_0_value = Concat<axis=2>(past_1_value, value)",
        },
        "caches of different layers",
    ),
    "cache cut in the graph": (
        {
            "repeat_key": """cut = Slice(present_0_key, i(1), i(9999), i(2)) k5 = Unsqueeze(cut, i(2))
                k6 = Expand(k5, i(1,1,2,1,1)) k = Reshape(k6, i(0,4,-1,8))"""
        },
        "that Slice 'cut' reads",
    ),
    "cache reordered in the graph": (
        {
            "inputs": {"beam": "int64[B] beam"},
            "join_key": "moved = Gather<axis=0>(past_0_key, beam) present_0_key = Concat<axis=2>(moved, key)",
        },
        "cache past_0_key: Gather reads it before it is joined",
    ),
    "new tokens in front": (
        {"join_key": "present_0_key = Concat<axis=2>(key, past_0_key)"},
        "Concat reads it before it is joined",
    ),
    "values scaled": (
        {
            "repeat_value": """v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1))
                v7 = Reshape(v6, i(0,4,-1,8)) v = Mul(v7, f(0.3))"""
        },
        "values multiplied by",
    ),
    "a fill that does not hide": (
        {"inputs": {"mask": "bool[B,1,S,T] seen"}, "mask": "masked = Where(seen, scaled, f(-100))"},
        r"expected a fill below every score, at most -9e\+08",
    ),
    "a floor that scores can reach": (
        {"mask": "m1 = Add(scaled, mask) masked = Max(m1, f(-100))"},
        r"expected a floor below every score, at most -9e\+08",
    ),
    "a floor that scores can reach once scaled": (
        {"scale": "s1 = Max(scores, f(-3e9)) scaled = Mul(s1, f(0.1))"},
        "expected a floor below every score",
    ),
    "a ceiling": ({"mask": "m1 = Add(scaled, mask) masked = Min(m1, f(3e38))"}, "no attention family recognizes it"),
    "the larger of two": (
        {"mask": "m1 = Add(scaled, mask) masked = Max(m1, mask)"},
        "no attention family recognizes it",
    ),
    "a floor inside the softcap": (
        {"scale": "s1 = Max(scores, f(-3e38)) s2 = Div(s1, f(2)) s3 = Tanh(s2) scaled = Mul(s3, f(2))"},
        "mask inside the softcap",
    ),
    "heads repeated in another order by Tile": (
        {"repeat_key": "k = Tile(present_0_key, i(1,2,1,1))"},
        "each head repeated for consecutive query heads, got another order",
    ),
    "tokens repeated by Tile": (
        {"repeat_key": "k5 = Tile(present_0_key, i(1,2,1,1)) k = Tile(k5, i(1,1,2,1))"},
        "with its tokens on axis -1 .* got another order of axes",
    ),
    "mask inside the softcap": (
        {
            "scale": "s1 = Add(scores, mask) s2 = Div(s1, f(2)) s3 = Tanh(s2) scaled = Mul(s3, f(2))",
            "mask": "masked = Identity(scaled)",
        },
        "mask inside the softcap",
    ),
    "softmax written out over the queries": (
        {
            "softmax": """top = ReduceMax(masked, i(-1)) less = Sub(masked, top) e = Exp(less)
                all = ReduceSum(e, i(2)) weights = Div(e, all)"""
        },
        "no attention family recognizes it",
    ),
    "softmax written out without its maximum": (
        {"softmax": "e = Exp(masked) all = ReduceSum(e, i(3)) weights = Div(e, all)"},
        "no attention family recognizes it",
    ),
    "softmax written out, divided by another sum": (
        {
            "softmax": """top = ReduceMax(masked, i(-1)) less = Sub(masked, top) e = Exp(less)
                all = ReduceSum(less, i(3)) weights = Div(e, all)"""
        },
        "no attention family recognizes it",
    ),
    "softmax written out, its sum without an axis": (
        {
            "inputs": {"query": "float[B,4,1,8] query", "mask": None},
            "outputs": {"out": "float[B,4,1,8] out"},
            "mask": "masked = Identity(scaled)",
            "softmax": """top = ReduceMax(masked, i(-1)) less = Sub(masked, top) e = Exp(less)
                all = ReduceSum<keepdims=0>(e, i(3)) weights = Div(e, all)""",
        },
        "no attention family recognizes it",
    ),
    "a guard against infinities": (
        {"guard": "bad = IsInf(weights) clean = Where(bad, f(0), weights)", "values": "out = MatMul(clean, v)"},
        "are read by IsInf",
    ),
    "the maximum over the queries": (
        {
            "softmax": """top = ReduceMax(masked, i(2)) less = Sub(masked, top) e = Exp(less)
                all = ReduceSum(e, i(3)) weights = Div(e, all)"""
        },
        "expected the maximum over the last axis",
    ),
    "a softcap inside another": (
        {"scale": "s1 = Tanh(scores) s2 = Mul(s1, f(2)) s3 = Tanh(s2) scaled = Mul(s3, f(2))"},
        "a softcap inside another",
    ),
    "guard that puts in ones": (
        {"guard": "bad = IsNaN(weights) clean = Where(bad, f(1), weights)", "values": "out = MatMul(clean, v)"},
        "expected NaN to become 0",
    ),
    "sinks without dropping their column": (
        {
            "inputs": {"sinks": "float[1,4,1,1] sinks"},
            "mask": "m1 = Add(scaled, mask) masked = Concat<axis=-1>(m1, sinks)",
        },
        "not dropped",
    ),
    "unknown number of heads": (
        {"inputs": {"past_key": "float[B,H,P,8] past_0_key", "key": "float[B,H,S,8] key"}},
        "size 4 can't be composed",
    ),
    "a cache that is returned in another order": (
        {
            "outputs": {"present_key": "float[B,T,2,8] present_0_key"},
            "join_key": "joined = Concat<axis=2>(past_0_key, key) present_0_key = Transpose<perm=[0,2,1,3]>(joined)",
            "repeat_key": "k5 = Unsqueeze(joined, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) k = Reshape(k6, i(0,4,-1,8))",
        },
        "no output returns",
    ),
    "a cache that is not returned": ({"outputs": {"present_key": None}}, "no output returns"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why_and_leave_the_model_whole(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    model = decoder(**changes)
    before = model.SerializeToString(deterministic=True)
    report = kivi.inspect(model)
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report
    with pytest.raises(kivi.UnsupportedModelError, match="can't rewrite"):
        kivi.rewrite(model)
    assert model.SerializeToString(deterministic=True) == before
