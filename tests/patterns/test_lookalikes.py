"""Graphs built to look like attention that they are not: each is refused for a reason, or gives the same result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
from graphs import BATCH, LINES, ONE_KV_HEAD, decoder, feeds, half, replay
from mask_graphs import FILL, INPUTS, PADDING, PLACES
from zoo import MODELS

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order
HALF_ROUNDING = 2e-3  # float16 has 11 bits; the original rounds scores, weights and sums to it, the op only its ends

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weights of tokens and heads exchanged by a reshape": (
        ONE_KV_HEAD
        | {
            "guard": """ws = Shape(weights) b = Gather(ws, i(0)) h = Gather(ws, i(1)) s = Gather(ws, i(2))
                t = Gather(ws, i(3)) to = Concat<axis=0>(b, s, h, t) swapped = Reshape(weights, to)""",
            "values": "out = MatMul(swapped, v)",
            "outputs": {"out": "float[B,S,4,8] out"},
        },
        "not proven to merge or split whole axes",
    ),
    "a softmax over the tokens of all queries": (
        {
            "softmax": """flat = Reshape(masked, i(0,0,-1)) w3 = Softmax<axis=-1>(flat) ms = Shape(masked)
                weights = Reshape(w3, ms)""",
        },
        "softmax over the axes ST merged into one",
    ),
    "a softmax over the tokens of all queries, written out": (
        {
            "softmax": """flat = Reshape(masked, i(0,0,-1)) top = ReduceMax(flat, i(-1)) x = Sub(flat, top) e = Exp(x)
                sum = ReduceSum(e, i(-1)) w3 = Div(e, sum) ms = Shape(masked) weights = Reshape(w3, ms)""",
        },
        "softmax over the axes ST merged into one",
    ),
    "old and new tokens of another cache as the query": (
        {
            "product": """scores = MatMul(query, kt) present_1_key = Concat<axis=2>(past_1_key, key)
                present_1_value = Concat<axis=2>(past_1_value, value) t1 = Transpose<perm=[0,1,3,2]>(present_1_key)
                c1 = MatMul(present_0_value, t1) w1 = Softmax<axis=-1>(c1)
                other = MatMul(w1, present_1_value)""",
            "inputs": {
                "past_1_key": "float[B,2,P,8] past_1_key",
                "past_1_value": "float[B,2,P,8] past_1_value",
            },
            "outputs": {
                "other": "float[B,2,T,8] other",
                "present_1_key": "float[B,2,T,8] present_1_key",
                "present_1_value": "float[B,2,T,8] present_1_value",
            },
        },
        "'present_0_value', which would vanish with the cache, is an operand of the attention",
    ),
    "heads that only the mask has": (
        ONE_KV_HEAD
        | {
            "inputs": ONE_KV_HEAD["inputs"] | {"query": "float[B,1,S,8] query", "mask": "float[B,4,S,T] mask"},
        },
        "not proven to leave the scores' shape",
    ),
    "query with rows and heads on one axis, keys with 3 axes": (
        {
            "repeat_key": """k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) ks = Shape(present_0_key)
                t = Gather(ks, i(2)) to = Concat<axis=0>(i(-1), t, i(8)) k = Reshape(k6, to)""",
            "repeat_value": "v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1)) v = Reshape(v6, to)",
            "transpose": "kt = Transpose<perm=[0,2,1]>(k)",
            "product": """qs = Shape(query) s = Gather(qs, i(2)) flat = Concat<axis=0>(i(1,-1), s, i(8))
                q4 = Reshape(query, flat) scores = MatMul(q4, kt)""",
            "mask": "masked = Identity(scaled)",
            "outputs": {"out": "float[X,Y,S,8] out"},
        },
        "expected a query of 3 axes",
    ),
    "one sink logit for all heads": (
        {
            "mask": """m1 = Add(scaled, mask) sinks = Reshape(f(0.5), i(1,1,1,1))
                qs = Shape(query) b = Gather(qs, i(0)) s = Gather(qs, i(2)) to = Concat<axis=0>(b, i(4), s, i(1))
                column = Expand(sinks, to) masked = Concat<axis=-1>(m1, column)""",
            "guard": "kept = Slice(weights, i(0), i(-1), i(3))",
            "values": "out = MatMul(kept, v)",
        },
        "expected a sink logit for each head",
    ),
    "batch axes transposed by the product": (
        {
            "domains": ', "com.microsoft": 1',
            "transpose": None,
            "product": "scaled = com.microsoft.FusedMatMul<alpha=0.3, transB=1, transBatchB=1>(query, k)",
            "scale": None,
            "mask": "masked = Identity(scaled)",
        },
        "batch axes transposed on the fly",
    ),
    "keys returned as values": (
        {
            "join_key": "present_0_value = Concat<axis=2>(past_0_key, key)",
            "join_value": "present_0_key = Concat<axis=2>(past_0_value, value)",
            "repeat_key": LINES["repeat_key"].replace("present_0_key", "present_0_value"),
            "repeat_value": LINES["repeat_value"].replace("present_0_value", "present_0_key"),
        },
        "'past_0_key' joined .* returned as 'present_0_value'",
    ),
    "returned to another layer": (
        {
            "join_key": "present_1_key = Concat<axis=2>(past_0_key, key)",
            "repeat_key": LINES["repeat_key"].replace("present_0_key", "present_1_key"),
            "outputs": {"present_key": "float[B,2,T,8] present_1_key"},
        },
        "'past_0_key' joined .* returned as 'present_1_key'",
    ),
    "a past of one length only": (
        {"inputs": {"past_key": "float[B,2,5,8] past_0_key"}},
        "declared to hold exactly 5 tokens",
    ),
    "a factor that does not fit its type": (
        {"scale": "c = Cast<to=2>(f(300)) n = Cast<to=1>(c) scaled = Mul(scores, n)"},
        "no attention family recognizes it",
    ),
    "a factor counted by a range of floats": (
        {"scale": "r = Range(f(0), f(2.5), f(1)) rs = Shape(r) n = Cast<to=1>(rs) scaled = Mul(scores, n)"},
        "no attention family recognizes it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_for_its_own_reason(name: str) -> None:
    changes, reason = REFUSED[name]
    report = kivi.inspect(decoder(**changes))
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report


SAME: dict[str, dict[str, Any]] = {
    "the first query's row for all, compared": {
        "inputs": INPUTS,
        "mask": f"{PLACES} first = Slice(q, i(0), i(1), i(0)) all = LessOrEqual(keys, first) {FILL}",
    },
    "the first query's row for all": {
        "inputs": INPUTS,
        "mask": f"{PLACES} all = Slice(seen, i(0), i(1), i(0)) {FILL}",
    },
    "the first query's row for all, expanded": {
        "inputs": INPUTS,
        "mask": f"""{PLACES} first = Slice(seen, i(0), i(1), i(0)) to = Concat<axis=0>(sn, tn)
            all = Expand(first, to) {FILL}""",
    },
    "as many rows as an input says, here 1": {
        "inputs": INPUTS | {"query_rows": "int64[1] rows"},
        "mask": f"{PLACES} sign = Sign(rows) n = Max(sign, i(1)) all = Slice(seen, i(0), n, i(0)) {FILL}",
    },
    "padding by fractions, cut to whole numbers": {
        "inputs": {"mask": "float[B,T] share"},
        "mask": f"""{PLACES} whole = Cast<to=7>(share) attention_mask = Identity(whole)
            {PADDING} all = And(held4, held4) {FILL}""",
    },
    "a factor after the fill": {
        "inputs": {"mask": "bool[B,1,S,T] seen"},
        "mask": "m = Where(seen, scaled, f(-3.0e38)) masked = Mul(m, f(3))",
    },
    "a softcap of two negative factors": {
        "scale": "s2 = Div(scores, f(-2)) s3 = Tanh(s2) scaled = Mul(s3, f(-2))",
    },
}


@pytest.mark.parametrize("name", SAME)
def test_what_looks_like_a_fact_but_is_none_gives_the_same_result(name: str, tmp_path: Path) -> None:
    model = decoder(**SAME[name])
    (site,) = kivi.inspect(model).sites
    assert not site.is_causal
    for expected, got in replay(model, tmp_path):
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_attention_in_half_precision_over_caches_that_are_not(tmp_path: Path) -> None:
    def join(side: str, letter: str) -> str:
        return f"""p{letter} = Cast<to=10>(past_0_{side}) n{letter} = Cast<to=10>({side})
            j{letter} = Concat<axis=2>(p{letter}, n{letter}) present_0_{side} = Cast<to=1>(j{letter})"""

    def repeat(letter: str) -> str:
        return f"""{letter}5 = Unsqueeze(j{letter}, i(2)) {letter}6 = Expand({letter}5, i(1,1,2,1,1))
            {letter} = Reshape({letter}6, i(0,4,-1,8))"""

    model = decoder(
        join_key=join("key", "k"),
        join_value=join("value", "v"),
        repeat_key=repeat("k"),
        repeat_value=repeat("v"),
        product="q = Cast<to=10>(query) scores = MatMul(q, kt)",
        scale="factor = Cast<to=10>(f(0.3)) scaled = Mul(scores, factor)",
        mask="m = Cast<to=10>(mask) masked = Add(scaled, m)",
        values="o = MatMul(weights, v) out = Cast<to=1>(o)",
    )
    assert kivi.inspect(model).element == "float16"
    for expected, got in replay(model, tmp_path):
        assert np.abs(got - expected).max() <= HALF_ROUNDING * np.ptp(expected)


def test_the_lowest_float16_hides_where_scores_are_float16(tmp_path: Path) -> None:
    lowest: dict[str, Any] = {
        "inputs": {"mask": "bool[B,1,S,T] seen"},
        "mask": "masked = Where(seen, scaled, f(-65504))",
    }
    assert "at most -9e+08" in kivi.inspect(decoder(**lowest)).misses[0].reason
    for expected, got in replay(half(decoder(**lowest)), tmp_path):
        assert np.abs(got.astype(np.float32) - expected).max() <= HALF_ROUNDING * np.ptp(expected)


def test_a_padding_row_that_a_finite_causal_fill_kept_finite_stays_finite(tmp_path: Path) -> None:
    model = decoder(
        inputs=INPUTS,
        mask=f"""{PLACES} {PADDING} causal = Where(seen, f(0), f(-3.0e38)) m1 = Add(scaled, causal)
            low = Mul(f(-3.0e38), f(10)) masked = Where(held4, m1, low)""",
    )
    (site,) = kivi.inspect(model).sites
    assert site.is_causal
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], tmp_path / "out.onnx")
    new = feeds(np.random.default_rng(0), 0, 3, model) | {"attention_mask": np.array([[0, 1, 1], [1, 1, 1]])}
    past = {f"past_0_{side}": np.zeros((BATCH, 2, 0, 8), np.float32) for side in ("key", "value")}
    original = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected, got = original.run(["out"], new | past)[0], kivi.Session(tmp_path / "out.onnx").run(["out"], new)[0]
    assert np.isfinite(expected).all()
    assert np.isfinite(got).all()
    assert np.abs(got - expected)[:, :, 1:].max() <= ROUNDING * np.ptp(expected)


def test_a_row_that_a_floor_kept_finite_stays_finite(tmp_path: Path) -> None:
    model = decoder(mask="m1 = Add(scaled, mask) masked = Max(m1, f(-3e38))")
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], tmp_path / "out.onnx")
    new = feeds(np.random.default_rng(0), 0, 3, model)
    new["mask"][0, :, 0] = -np.inf
    past = {f"past_0_{side}": np.zeros((BATCH, 2, 0, 8), np.float32) for side in ("key", "value")}
    original = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected, got = original.run(["out"], new | past)[0], kivi.Session(tmp_path / "out.onnx").run(["out"], new)[0]
    assert np.isfinite(expected).all()
    assert np.isfinite(got).all()
    assert np.abs(got - expected)[:, :, 1:].max() <= ROUNDING * np.ptp(expected)


def test_a_prompt_joined_with_tokens_does_not_count_as_past(tmp_path: Path) -> None:
    prompt = "tn = Add(pn, sn) ms = Shape(past_prompt) mn = Gather(ms, i(1)) en = Add(mn, sn) e = Squeeze(en)"
    lines = PLACES.replace("p = Squeeze(pn)", "p = Squeeze(mn)").replace("tn = Add(pn, sn)", prompt)
    model = decoder(
        inputs={"mask": None, "prompt": "float[B,M,8] past_prompt"},
        outputs={"embedded": "float[B,E,8] embedded"},
        product="""scores = MatMul(query, kt) tokens = ReduceSum<keepdims=0>(query, i(1))
            embedded = Concat<axis=1>(past_prompt, tokens)""",
        mask=f"{lines.replace('Range(p, t, one)', 'Range(p, e, one)')} all = Identity(seen) {FILL}",
    )
    with pytest.raises(kivi.UnsupportedModelError, match="a cache that nothing reads"):
        kivi.rewrite(model)
    partial, _ = kivi.rewrite(model, kivi.KiviConfig(32, 32), partial=True)
    kivi.save(partial, tmp_path / "out.onnx")
    original = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session, rng = kivi.Session(tmp_path / "out.onnx"), np.random.default_rng(0)
    names = [o.name for o in original.get_outputs()]
    past = {f"past_0_{side}": np.zeros((BATCH, 2, 0, 8), np.float32) for side in ("key", "value")}
    for count, length in ((5, 0), (3, 2), (1, 9)):
        new = feeds(rng, 0, count, model) | {"past_prompt": np.zeros((BATCH, length, 8), np.float32)}
        before = dict(zip(names, original.run(None, new | past), strict=True))
        got = session.run(["out"], new)[0]
        assert np.abs(got - before["out"]).max() <= ROUNDING * np.ptp(before["out"])
        past = {name: before[name.replace("past", "present")] for name in past}


# Constants that pick an axis of a shape; 0 makes it the batch's. Of one sequence, one row or column serves all.
COUNTED = {
    "a row for each sequence": ("optimum/mistral", "/model/Constant_1"),
    "a column for each sequence": ("optimum/falcon_mqa", "/transformer/h.0/self_attention/Constant_40"),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_causal_mask_that_counts_sequences_is_no_causal_mask(name: str) -> None:
    path, constant = COUNTED[name]
    model = onnx.load(MODELS[path])
    assert all(site.is_causal for site in kivi.inspect(model).sites)
    index = next(node for node in model.graph.node if node.name == constant)
    index.attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array(0)))
    report = kivi.inspect(model)
    assert report.sites
    assert not report.sites[0].is_causal
