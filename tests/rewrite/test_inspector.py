"""The report: facts of each site, reasons of each miss, as data and as text; nothing is changed or guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

import onnx_kivi as kivi
from graphs import decoder
from onnx_kivi.patterns import FAMILIES

KEYS = {
    "layer",
    "family",
    "node",
    "q_heads",
    "kv_heads",
    "k_head_size",
    "v_head_size",
    "scale",
    "mask",
    "causal",
    "window",
    "softcap",
    "cache_inputs",
    "cache_outputs",
}


def test_facts_of_a_site_as_json() -> None:
    softcap = "s1 = Mul(scores, f(0.3)) s2 = Div(s1, f(2)) s3 = Tanh(s2) scaled = Mul(s3, f(2))"
    data: dict[str, Any] = json.loads(json.dumps(kivi.inspect(decoder(scale=softcap)).to_dict()))
    assert data["misses"] == []
    assert data["element"] == "float"
    (site,) = data["sites"]
    assert site.keys() >= KEYS
    assert (site["q_heads"], site["kv_heads"], site["k_head_size"], site["v_head_size"]) == (4, 2, 8, 8)
    assert site["scale"] == pytest.approx(0.3, rel=1e-6)  # a float32 constant
    assert site["softcap"] == 2
    assert site["mask"] == ["mask"]
    assert (site["causal"], site["window"]) == (False, 0)
    assert site["cache_inputs"] == ["past_0_key", "past_0_value"]
    assert site["cache_outputs"] == ["present_0_key", "present_0_value"]


def test_a_path_and_a_model_give_the_same_report(tiny: Path) -> None:
    assert kivi.inspect(tiny) == kivi.inspect(onnx.load(tiny))
    assert [site.layer for site in kivi.inspect(tiny).sites] == [0, 1]


def test_text_names_every_site_and_every_miss() -> None:
    table = str(kivi.inspect(decoder()))
    for word in ("layer", "decomposed", "4/2", "8/8", "1 tensor", "weights"):
        assert word in table
    missed = str(kivi.inspect(decoder(softmax="weights = Softmax<axis=2>(masked)")))
    assert "no attention over a cache was matched" in missed
    assert "expected the last axis" in missed


def test_a_cache_that_never_grows_is_neither_site_nor_miss() -> None:
    model = decoder(
        inputs={"cross": "float[B,4,E,8] past_0_encoder_key"},
        outputs={"more": "float[B,4,S,E] more"},
        guard="turned = Transpose<perm=[0,1,3,2]>(past_0_encoder_key) more = MatMul(query, turned)",
    )
    report = kivi.inspect(model)
    assert len(report.sites) == 1
    assert not report.misses


def test_a_state_that_does_not_grow_is_named_as_such() -> None:
    def inspected(size: str) -> kivi.Report:
        return kivi.inspect(
            decoder(
                inputs={"state": f"float[B,8,{size}] past_1_conv", "fresh": "float[B,8,S] fresh"},
                outputs={"more": "float[B,8,S] more", "held": "float[B,8,2] present_1_conv"},
                guard="""joined = Concat<axis=2>(past_1_conv, fresh) weight = Reshape(f(1,2,3), i(1,1,3))
                    wide = Expand(weight, i(8,1,3)) more = Conv<group=8>(joined, wide)
                    present_1_conv = Slice(joined, i(-2), i(9999), i(2))""",
            )
        )

    report = inspected("2")
    assert [miss.node for miss in report.misses] == ["past_1_conv"]
    assert "a state of 2 tokens that Conv 'more' reads, which does not grow" in report.misses[0].reason
    assert len(report.sites) == 1
    assert "a cache that Conv 'more' reads" in inspected("N").misses[0].reason


def test_a_latent_cache_is_named_as_such_and_so_is_the_one_beside_it() -> None:
    model = decoder(
        inputs={"up": "float[8,8] tokens"},
        repeat_key="""flat = Reshape(present_0_key, i(0,2,-1,8)) eye = EyeLike<dtype=1>(tokens)
            weight = Reshape(f(1,0,0,1,2,3,4,5), i(8,1)) projected = MatMul(flat, weight) k = MatMul(flat, eye)""",
        repeat_value="v = Identity(present_0_value)",
    )
    reasons = {miss.node: miss.reason for miss in kivi.inspect(model).misses}
    assert "latent cache: MatMul 'projected' projects it up" in reasons["past_0_key"]
    assert "latent cache: MatMul 'projected' projects 'past_0_key' up" in reasons["past_0_value"]


def test_an_attention_without_cache_is_no_miss() -> None:
    model = decoder(
        outputs={"more": "float[B,2,S,8] more"},
        guard="""turned = Transpose<perm=[0,1,3,2]>(key) s1 = MatMul(key, turned) w1 = Softmax<axis=-1>(s1)
            more = MatMul(w1, value)""",
    )
    report = kivi.inspect(model)
    assert len(report.sites) == 1
    assert not report.misses


def test_every_family_has_its_own_name_and_anchors() -> None:
    names = [family.FAMILY for family in FAMILIES]
    assert len(set(names)) == len(names)
    assert all(family.ANCHORS for family in FAMILIES)
