"""The family `mha`: MultiHeadAttention with past and present, every mask it takes, gives the original's result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_kivi as kivi
from graphs import decoder, replay

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order
GONE: dict[str, Any] = dict.fromkeys(("repeat_key", "repeat_value", "transpose", "product", "scale", "mask", "softmax"))
INSIDE: dict[str, Any] = GONE | dict.fromkeys(("join_key", "join_value"))
MERGED = {
    "query": "float[B,S,32] query",
    "key": "float[B,S,32] key",
    "value": "float[B,S,32] value",
    "mask": None,
    "past_key": "float[B,4,P,8] past_0_key",
    "past_value": "float[B,4,P,8] past_0_value",
}
RESULTS = {
    "out": "float[B,S,32] out",
    "present_key": "float[B,4,T,8] present_0_key",
    "present_value": "float[B,4,T,8] present_0_value",
}


def mha(
    attributes: str = "",
    bias: str = "",
    padding: str = "",
    more: str = "",
    tail: str = "",
    inputs: Mapping[str, str | None] | None = None,
    outputs: str = "",
    **changes: Any,
) -> onnx.ModelProto:
    """A one-node decoder with its past inside: bias, key_padding_mask, attention_bias by name."""
    node = f"""out, present_0_key, present_0_value{outputs} = com.microsoft.MultiHeadAttention<num_heads=4{attributes}>(
        query, key, value, {bias}, {padding}, {more}, past_0_key, past_0_value{tail})"""
    return decoder(
        inputs={**MERGED, **(inputs or {})},
        outputs=RESULTS | changes.pop("gives", {}),
        domains=', "com.microsoft": 1',
        values=node,
        **INSIDE,
        **changes,
    )


SPELLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, scale": {"attributes": ", unidirectional=1, scale=0.3"},
    "bias": {"inputs": {"bias": "float[96] bias"}, "bias": "bias"},
    "attention bias of one head": {"inputs": {"more": "float[B,1,S,T] more"}, "more": "more"},
    "attention bias": {
        "inputs": {"more": "float[1,4,S,T] more"},
        "more": "more",
        "attributes": ", unidirectional=1",
    },
    "padding (B, T)": {
        "inputs": {"padding": "int32[B,T] seen"},
        "padding": "seen",
        "attributes": ", unidirectional=1",
    },
    "padding (B, S, T), fill": {
        "inputs": {"padding": "int32[B,S,T] seen"},
        "padding": "seen",
        "attributes": ", mask_filter_value=-3.0",
    },
    "padding by ends": {"inputs": {"padding": "int32[B] ends"}, "padding": "ends"},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_give_the_original_s_result(name: str, tmp_path: Path) -> None:
    model = mha(**SPELLINGS[name])
    report = kivi.inspect(model)
    assert not report.misses
    assert report.sites[0].family == "mha"
    for expected, got in replay(model, tmp_path):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


OUTSIDE: dict[str, dict[str, Any]] = {
    "as they are": {
        "inputs": MERGED | {"key": "float[B,4,S,8] key", "value": "float[B,4,S,8] value"},
        "outputs": RESULTS,
        "values": """out = com.microsoft.MultiHeadAttention<num_heads=4>(query, present_0_key, present_0_value)""",
    },
    "heads repeated": {
        "inputs": {"query": "float[B,S,32] query", "mask": "float[B,1,S,T] mask"},
        "outputs": {"out": "float[B,S,32] out"},
        "repeat_key": "k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) k = Reshape(k6, i(0,4,-1,8))",
        "repeat_value": """v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1))
            v = Reshape(v6, i(0,4,-1,8))""",
        "values": "out = com.microsoft.MultiHeadAttention<num_heads=4>(query, k, v, , , mask)",
    },
    "heads repeated and merged": {
        "inputs": {"query": "float[B,S,32] query", "mask": "float[B,1,S,T] mask"},
        "outputs": {"out": "float[B,S,32] out"},
        "repeat_key": """k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1))
            k7 = Reshape(k6, i(0,4,-1,8)) k8 = Transpose<perm=[0,2,1,3]>(k7) k = Reshape(k8, i(0,0,32))""",
        "repeat_value": """v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1))
            v7 = Reshape(v6, i(0,4,-1,8)) v8 = Transpose<perm=[0,2,1,3]>(v7) v = Reshape(v8, i(0,0,32))""",
        "values": "out = com.microsoft.MultiHeadAttention<num_heads=4>(query, k, v, , , mask)",
    },
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_caches_joined_outside(name: str, tmp_path: Path) -> None:
    model = decoder(domains=', "com.microsoft": 1', **(GONE | OUTSIDE[name]))
    report = kivi.inspect(model)
    assert not report.misses
    assert report.sites[0].family == "mha"
    for expected, got in replay(model, tmp_path):
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_cross_attention_is_no_site() -> None:
    """Over an encoder's keys and values, which no Concat extends, beside a site that is one."""
    cross = """) crossed = com.microsoft.MultiHeadAttention<num_heads=4>(query, encoder_key, encoder_value"""
    model = mha(
        tail=cross,
        inputs={"ek": "float[B,4,E,8] encoder_key", "ev": "float[B,4,E,8] encoder_value"},
        gives={"crossed": "float[B,S,32] crossed"},
    )
    report = kivi.inspect(model)
    assert not report.misses
    assert [site.family for site in report.sites] == ["mha"]


NEAR_MISSES: dict[str, tuple[onnx.ModelProto, str]] = {
    "shared buffer": (
        mha(tail=", length", inputs={"length": "int32[1] length"}),
        "the past length of a shared buffer",
    ),
    "a past in another order": (
        decoder(
            inputs=MERGED | {"past_key": "float[B,P,4,8] past_0_key"},
            outputs=RESULTS | {"present_key": "float[B,T,4,8] present_0_key"},
            domains=', "com.microsoft": 1',
            values="""turned = Transpose<perm=[0,2,1,3]>(past_0_key)
                out, whole, present_0_value = com.microsoft.MultiHeadAttention<num_heads=4>(
                    query, key, value, , , , turned, past_0_value)
                present_0_key = Transpose<perm=[0,2,1,3]>(whole)""",
            **INSIDE,
        ),
        "a cache that nothing reads",
    ),
    "scores as an output": (mha(outputs=", w", gives={"w": "float[B,4,S,T] w"}), "the scores, is read"),
    "ends and starts packed": (
        mha(padding="ends", inputs={"padding": "int32[N] ends"}),
        r"mask 'ends' of shape \['N'\]",
    ),
    "packed query": (
        decoder(
            inputs=MERGED | {"query": "float[B,S,4,3,8] query", "key": None, "value": None},
            outputs=RESULTS,
            domains=', "com.microsoft": 1',
            values="""out, present_0_key, present_0_value = com.microsoft.MultiHeadAttention<num_heads=4>(
                query, , , , , , past_0_key, past_0_value)""",
            **INSIDE,
        ),
        "packed operands",
    ),
    "causal over a cache outside": (
        decoder(
            domains=', "com.microsoft": 1',
            **(
                GONE
                | OUTSIDE["as they are"]
                | {
                    "values": """out = com.microsoft.MultiHeadAttention<num_heads=4, unidirectional=1>(
                        query, present_0_key, present_0_value)"""
                }
            ),
        ),
        "counts positions from 0",
    ),
    "bias over a cache outside": (
        decoder(
            domains=', "com.microsoft": 1',
            **(
                GONE
                | OUTSIDE["heads repeated and merged"]
                | {
                    "inputs": OUTSIDE["heads repeated and merged"]["inputs"] | {"bias": "float[96] bias"},
                    "values": "out = com.microsoft.MultiHeadAttention<num_heads=4>(query, k, v, bias, , mask)",
                }
            ),
        ),
        "the bias of a projection of what is in the cache already",
    ),
    "heads and size exchanged before they are merged": (
        decoder(
            domains=', "com.microsoft": 1',
            **(
                GONE
                | OUTSIDE["heads repeated and merged"]
                | {
                    "repeat_key": """k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1))
                        k7 = Reshape(k6, i(0,4,-1,8)) k8 = Transpose<perm=[0,2,3,1]>(k7) k = Reshape(k8, i(0,0,32))"""
                }
            ),
        ),
        "got another order of axes",
    ),
    "values that are no cache": (
        decoder(
            domains=', "com.microsoft": 1',
            **(
                GONE
                | OUTSIDE["as they are"]
                | {
                    "inputs": OUTSIDE["as they are"]["inputs"] | {"past_value": None, "value": "float[B,4,T,8] value"},
                    "outputs": RESULTS | {"present_value": None},
                    "join_value": None,
                    "values": "out = com.microsoft.MultiHeadAttention<num_heads=4>(query, present_0_key, value)",
                }
            ),
        ),
        "expected keys and values of caches",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    model, reason = NEAR_MISSES[name]
    report = kivi.inspect(model)
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report
