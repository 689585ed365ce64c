"""The family `ms_attention`: Attention with its projection inside and a packed past gives the original's result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_kivi as kivi
from graphs import BATCH, decoder, replay

# Queries and keys of 24 products of order 1 each, whose scores reach 100: sums taken in another order.
ROUNDING = 1e-5
GONE: dict[str, Any] = dict.fromkeys(
    ["join_key", "join_value", "repeat_key", "repeat_value", "transpose", "product", "scale", "mask", "softmax"],
)
NOT_HERE = dict.fromkeys(("query", "key", "value", "mask", "past_key", "past_value"))
INPUTS = {
    "input": "float[B,S,24] input",
    "past": "float[2,B,4,P,8] past_0",
    "weights": "float[24,96] weights",
    "bias": "float[96] bias",
}
OUTPUTS = {
    "out": "float[B,S,32] out",
    "present": "float[2,B,4,T,8] present_0",
    "present_key": None,
    "present_value": None,
}


def attention(
    attributes: str = ", unidirectional=1",
    bias: str = "bias",
    mask: str = "",
    tail: str = "",
    inputs: Mapping[str, str | None] | None = None,
    front: str = "",
    **changes: Any,
) -> onnx.ModelProto:
    """A one-node decoder; `mask` is mask_index."""
    node = f"""{front} out, present_0 = com.microsoft.Attention<num_heads=4{attributes}>(
        input, weights, {bias}, {mask}, past_0{tail})"""
    return decoder(
        inputs={**NOT_HERE, **INPUTS, **(inputs or {})},
        outputs=OUTPUTS | changes.pop("gives", {}),
        domains=', "com.microsoft": 1',
        values=node,
        **GONE,
        **changes,
    )


SPELLINGS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sees everything, scale": {"attributes": ", scale=0.2"},
    "no bias": {"bias": "", "inputs": {"bias": None}},
    "old opset": {"opset": 12},
    "mask (B, T)": {"inputs": {"mask": "int32[B,T] seen"}, "mask": "seen"},
    "mask (B, S, T), fill": {
        "attributes": ", mask_filter_value=-2.0",
        "inputs": {"mask": "int32[B,S,T] seen"},
        "mask": "seen",
    },
    "ends": {"attributes": "", "inputs": {"mask": "int32[B] ends"}, "mask": "ends"},
    "ends and starts": {
        "attributes": "",
        "inputs": {"ends": "int32[B] ends", "starts": "int32[B] starts"},
        "front": "bounds = Concat<axis=0>(ends, starts)",
        "mask": "bounds",
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_give_the_original_s_result(name: str, tmp_path: Path) -> None:
    model = attention(**SPELLINGS[name])
    report = kivi.inspect(model)
    assert not report.misses
    assert report.sites[0].family == "ms_attention"
    for expected, got in replay(model, tmp_path):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_the_packed_cache_leaves_as_one_input_and_one_output() -> None:
    model = attention()
    site = kivi.inspect(model).sites[0]
    assert (site.cache_inputs, site.cache_outputs) == (("past_0",), ("present_0",))
    assert (site.q_heads, site.kv_heads, site.k_head_size, site.v_head_size) == (4, 4, 8, 8)
    rewritten, _ = kivi.rewrite(model)
    names = {i.name for i in rewritten.graph.input} | {o.name for o in rewritten.graph.output}
    assert not names & {"past_0", "present_0"}


def test_without_a_past_it_is_no_site() -> None:
    """An encoder's: no cache at all."""
    model = decoder(
        inputs=NOT_HERE | INPUTS | {"past": None},
        outputs=OUTPUTS | {"present": None},
        domains=', "com.microsoft": 1',
        values="out = com.microsoft.Attention<num_heads=4>(input, weights, bias)",
        **GONE,
    )
    report = kivi.inspect(model)
    assert not report.sites
    assert [miss.node for miss in report.misses] == ["model"]


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "rotary inside": ({"attributes": ", do_rotary=1"}, "do_rotary"),
    "shared buffer": ({"attributes": ", past_present_share_buffer=1"}, "past_present_share_buffer"),
    "bias beside the past": (
        {"inputs": {"more": "float[B,4,S,T] more"}, "tail": ", more"},
        "a bias of the scores beside a past",
    ),
    "past length given": (
        {"inputs": {"length": "int32 length"}, "tail": ", , length"},
        "the past length of a shared buffer",
    ),
    "mask of four axes": (
        {"inputs": {"mask": "int32[B,1,M,M] seen"}, "mask": "seen"},
        r"mask 'seen' of shape \['B', '1', 'M', 'M'\]",
    ),
    "packed lengths": (
        {"inputs": {"mask": "int32[N] lengths"}, "mask": "lengths"},
        r"mask 'lengths' of shape \['N'\]",
    ),
    "values of another width": (
        {"attributes": ", qkv_hidden_sizes=[32, 32, 40]"},
        "qkv_hidden_sizes differ",
    ),
    "a cache that is not returned": (
        {
            "front": "",
            "tail": ") more = ReduceSum<keepdims=0>(present_0",
            "gives": {"present": None, "m": "float more"},
        },
        "no output returns",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    report = kivi.inspect(attention(**changes))
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report
    assert BATCH > 1
