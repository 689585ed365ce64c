"""Products over kv heads and their query heads, by MatMul of 4 and 5 axes or by Einsum: the same operands as any other.

Each spelling gives the original's result at 32 bits, with and without quantization sealed; each near miss says why not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_kivi as kivi
from graphs import ONE_KV_HEAD, decoder, replay
from onnx_kivi.graph import read_equation
from onnx_kivi.patterns.matching import axes
from onnx_kivi.patterns.matching.axes import TOKENS_SIGNS, Sign

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order
EIGHT_BITS = 0.02  # a step of 1/255 of the range, softened by the softmax

PLAIN = {"repeat_key": "k = Identity(present_0_key)", "repeat_value": "v = Identity(present_0_value)"}
GROUPED: dict[str, Any] = {
    "repeat_key": "k = Unsqueeze(present_0_key, i(2))",
    "repeat_value": "v = Unsqueeze(present_0_value, i(2))",
    "transpose": "kt = Transpose<perm=[0,1,2,4,3]>(k)",
    "product": "q5 = Reshape(query, i(0,2,2,-1,8)) scores = MatMul(q5, kt)",
    "mask": "m5 = Unsqueeze(mask, i(1)) masked = Add(scaled, m5)",
    "values": "o5 = MatMul(weights, v) out = Reshape(o5, i(0,4,-1,8))",
}
FOLDED = PLAIN | {
    "product": "q4 = Reshape(query, i(0,2,-1,8)) scores = MatMul(q4, kt)",
    "scale": "s1 = Mul(scores, f(0.3)) qs = Shape(query) n = Gather(qs, i(2)) to = Concat<axis=0>(i(0,4), n, i(-1)) "
    "scaled = Reshape(s1, to)",
    "values": """down = Concat<axis=0>(i(0,2), rows, i(-1)) w4 = Reshape(weights, down) o4 = MatMul(w4, v)
        out = Reshape(o4, i(0,4,-1,8))""",
    "guard": "rows = Mul(n, i(2))",
}
EINSUM = PLAIN | {
    "transpose": None,
    "product": 'q5 = Reshape(query, i(0,2,2,-1,8)) scores = Einsum<equation="bkgsd,bktd->bkgst">(q5, k)',
    "mask": GROUPED["mask"],
    "values": """o5 = Einsum<equation="bkgst,bktd->bkgsd">(weights, v) out = Reshape(o5, i(0,4,-1,8))""",
}
REPEATED = {
    "transpose": None,
    "product": 'scores = Einsum<equation="bhsd,bhtd->bhst">(query, k)',
    "values": 'out = Einsum<equation="bhst,bhtd->bhsd">(weights, v)',
}
TOKENS_FIRST: dict[str, Any] = {
    "inputs": {
        "query": "float[B,S,4,8] query",
        "key": "float[B,S,2,8] key",
        "value": "float[B,S,2,8] value",
        "past_key": "float[B,P,2,8] past_0_key",
        "past_value": "float[B,P,2,8] past_0_value",
    },
    "outputs": {
        "out": "float[B,S,4,8] out",
        "present_key": "float[B,T,2,8] present_0_key",
        "present_value": "float[B,T,2,8] present_0_value",
    },
    "join_key": "present_0_key = Concat<axis=1>(past_0_key, key)",
    "join_value": "present_0_value = Concat<axis=1>(past_0_value, value)",
}
FULL_MASK = {"inputs": {"mask": "float[B,4,S,T] mask"}}
SINKS = """sinks = Reshape(f(0.5,-0.5,1,2), i(1,2,2,1,1)) ss = Shape(m1) lead = Slice(ss, i(0), i(-1))
    to = Concat<axis=0>(lead, i(1)) column = Expand(sinks, to) masked = Concat<axis=-1>(m1, column)"""

SEEN5 = """qs = Shape(query) sn = Gather(qs, i(2)) s = Squeeze(sn) ps = Shape(past_0_key) pn = Gather(ps, i(2))
    p = Squeeze(pn) t = Add(p, s) zero = Squeeze(i(0)) one = Squeeze(i(1)) at = Range(p, t, one)
    keys = Range(zero, t, one) rows = Unsqueeze(at, i(1)) seen = LessOrEqual(keys, rows)
    seen5 = Unsqueeze(seen, i(0,1,2))"""

SPELLINGS: dict[str, dict[str, Any]] = {
    "5 axes": GROUPED,
    "5 axes, a term for each head": GROUPED
    | FULL_MASK
    | {
        "mask": """ms = Shape(mask) n = Slice(ms, i(2), i(4)) to = Concat<axis=0>(i(0,2,2), n)
            m5 = Reshape(mask, to) masked = Add(scaled, m5)"""
    },
    "5 axes, a term for each kv head": GROUPED
    | {"mask": "m5 = Unsqueeze(mask, i(1)) b = Reshape(f(0.5,2), i(2,1,1,1)) m6 = Add(scaled, b) masked = Add(m6, m5)"},
    "5 axes, a term for each head of a group": GROUPED
    | {"mask": "m5 = Unsqueeze(mask, i(1)) b = Reshape(f(0.5,2), i(2,1,1)) m6 = Add(scaled, b) masked = Add(m6, m5)"},
    "5 axes, a term for each head joined with one for all": GROUPED
    | {
        "inputs": {"mask": None},
        "mask": f"""{SEEN5} b = Reshape(f(0.5,2,1,0), i(2,2,1,1)) hidden = Where(seen5, f(0), f(-3.0e38))
            both = Add(hidden, b) masked = Add(scaled, both)""",
    },
    "5 axes, a term of two axes": GROUPED
    | {"inputs": {"mask": "float[S,T] mask"}, "mask": "masked = Add(scaled, mask)"},
    "5 axes, filled": GROUPED
    | {
        "inputs": {"mask": "bool[B,1,S,T] seen"},
        "mask": "s5 = Unsqueeze(seen, i(2)) masked = Where(s5, scaled, f(-3.0e38))",
    },
    "5 axes, scores of 4 in between": GROUPED
    | {
        "mask": """ms = Shape(mask) n = Slice(ms, i(2), i(4)) up = Concat<axis=0>(i(0,4), n)
            s4 = Reshape(scaled, up) masked = Add(s4, mask)""",
        "guard": "back = Concat<axis=0>(i(0,2,2), n) w5 = Reshape(weights, back)",
        "values": "o5 = MatMul(w5, v) out = Reshape(o5, i(0,4,-1,8))",
    },
    "5 axes, sink logits": GROUPED
    | {
        "mask": f"m5 = Unsqueeze(mask, i(1)) m1 = Add(scaled, m5) {SINKS}",
        "guard": "kept = Slice(weights, i(0), i(-1), i(4))",
        "values": "o5 = MatMul(kept, v) out = Reshape(o5, i(0,4,-1,8))",
    },
    "5 axes, keys expanded, values broadcast": GROUPED
    | {"repeat_key": "k5 = Unsqueeze(present_0_key, i(2)) k = Expand(k5, i(1,1,2,1,1))"},
    "folded": FOLDED,
    "folded throughout, a term for each row": FOLDED
    | {
        "scale": "qs = Shape(query) n = Gather(qs, i(2)) scaled = Mul(scores, f(0.3))",
        "mask": "tiled = Concat<axis=2>(mask, mask) masked = Add(scaled, tiled)",
        "guard": None,
        "values": "o4 = MatMul(weights, v) out = Reshape(o4, i(0,4,-1,8))",
    },
    "folded, one token": FOLDED
    | {
        "inputs": {
            "query": "float[B,4,1,8] query",
            "key": "float[B,2,1,8] key",
            "value": "float[B,2,1,8] value",
            "mask": None,
        },
        "outputs": {"out": "float[B,4,1,8] out"},
        "scale": "scaled = Mul(scores, f(0.3))",
        "mask": "masked = Identity(scaled)",
        "guard": None,
        "values": "o4 = MatMul(weights, v) out = Reshape(o4, i(0,4,-1,8))",
    },
    "Einsum, heads repeated": REPEATED,
    "Einsum, other letters, spaces, operands swapped": REPEATED
    | {
        "product": 'scores = Einsum<equation="ijkz, ijyz -> ij yk">(k, query)',
        "values": 'out = Einsum<equation="nhkz,nhqk->nhqz">(v, weights)',
    },
    "Einsum, an ellipsis": REPEATED
    | {
        "product": 'scores = Einsum<equation="...sd,...td->...st">(query, k)',
        "values": 'out = Einsum<equation="...st,...td->...sd">(weights, v)',
    },
    "Einsum, its result implied": REPEATED | {"product": 'scores = Einsum<equation="...cz,...dz">(query, k)'},
    "Einsum, keys transposed before": REPEATED
    | {
        "transpose": "kt = Transpose<perm=[0,1,3,2]>(k)",
        "product": 'scores = Einsum<equation="bhsd,bhdt->bhst">(query, kt)',
    },
    "Einsum, grouped": EINSUM,
    "Einsum, grouped, query heads in turn in the query alone": EINSUM
    | {
        "product": """q5 = Reshape(query, i(0,2,2,-1,8)) q6 = Transpose<perm=[0,2,1,3,4]>(q5)
        scores = Einsum<equation="bgksd,bktd->bkgst">(q6, k)"""
    },
    "Einsum, tokens first": TOKENS_FIRST
    | PLAIN
    | {
        "transpose": None,
        "product": 'q5 = Reshape(query, i(0,0,2,2,8)) scores = Einsum<equation="bskgd,btkd->bkgst">(q5, k)',
        "mask": GROUPED["mask"],
        "values": 'o5 = Einsum<equation="bkgst,btkd->bskgd">(weights, v) out = Reshape(o5, i(0,0,4,8))',
    },
    "Einsum, tokens first, heads repeated": TOKENS_FIRST
    | {
        "repeat_key": "k5 = Unsqueeze(present_0_key, i(3)) k6 = Expand(k5, i(1,1,1,2,1)) k = Reshape(k6, i(0,-1,4,8))",
        "repeat_value": """v5 = Unsqueeze(present_0_value, i(3)) v6 = Expand(v5, i(1,1,1,2,1))
            v = Reshape(v6, i(0,-1,4,8))""",
        "transpose": None,
        "product": 'scores = Einsum<equation="bshd,bthd->bhst">(query, k)',
        "values": 'out = Einsum<equation="bhst,bthd->bshd">(weights, v)',
    },
    "Einsum, then MatMul": REPEATED | {"values": "out = MatMul(weights, v)"},
    "Einsum over one kv head without an axis for it": ONE_KV_HEAD
    | {
        "repeat_key": "k = Squeeze(present_0_key, i(1))",
        "repeat_value": "v = Squeeze(present_0_value, i(1))",
        "transpose": None,
        "product": 'scores = Einsum<equation="bhsd,btd->bhst">(query, k)',
        "values": 'out = Einsum<equation="bhst,btd->bhsd">(weights, v)',
    },
    "a query transposed by the product": {
        "domains": ', "com.microsoft": 1',
        "product": """qt = Transpose<perm=[0,1,3,2]>(query)
            scores = com.microsoft.FusedMatMul<alpha=1.0, transA=1>(qt, kt)""",
    },
}


def steps_of(model: onnx.ModelProto) -> bool:
    """Whether a model takes any number of new tokens."""
    (query,) = (i for i in model.graph.input if i.name == "query")
    return not any(d.dim_value == 1 for d in query.type.tensor_type.shape.dim)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_give_the_original_s_result(
    name: str, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder(**SPELLINGS[name])
    if not steps_of(model):
        monkeypatch.setattr("graphs.STEPS", (1,) * 10)
    report = kivi.inspect(model)
    assert not report.misses
    (site,) = report.sites
    assert (site.q_heads, site.kv_heads) == (4, 1 if "one kv head" in name else 2)
    first, *others = replay(model, tmp_path, bits)
    limit = ROUNDING if bits == 32 else EIGHT_BITS
    assert np.abs(first[0] - first[1]).max() <= ROUNDING * np.ptp(first[0])
    differences = []
    for expected, got in others:
        assert got.shape == expected.shape
        differences.append(np.abs(got - expected).max() / np.ptp(expected))
    assert max(differences) <= limit
    if bits == 8:
        assert max(differences) > 10 * ROUNDING  # something was sealed


def fixed(tokens: int, heads: int) -> dict[str, Any]:
    """Tokens first, so many of them in each run, and so many query heads over 2 kv heads."""
    changed = {
        "query": f"float[B,{tokens},{heads},8] query",
        "key": f"float[B,{tokens},2,8] key",
        "value": f"float[B,{tokens},2,8] value",
        "mask": None,
    }
    return TOKENS_FIRST | {
        "inputs": TOKENS_FIRST["inputs"] | changed,
        "outputs": TOKENS_FIRST["outputs"] | {"out": f"float[B,{tokens},{heads},8] out"},
        "mask": "masked = Identity(scaled)",
    }


BSKGD = PLAIN | {
    "transpose": None,
    "product": 'q5 = Reshape(query, i(0,0,2,-1,8)) scores = Einsum<equation="bskgd,btkd->bkgst">(q5, k)',
    "values": 'o5 = Einsum<equation="bkgst,btkd->bskgd">(weights, v) out = Reshape(o5, i(0,0,-1,8))',
}
OWN_NAMES = {
    "inputs": TOKENS_FIRST["inputs"] | {side: f"float[B,N_{side},2,8] {side}" for side in ("key", "value")},
    "mask": GROUPED["mask"],
}
FIXED_FOLDED = FOLDED | {
    "inputs": {
        "query": "float[B,4,3,8] query",
        "key": "float[B,2,3,8] key",
        "value": "float[B,2,3,8] value",
        "mask": None,
    },
    "outputs": {"out": "float[B,4,3,8] out"},
    "scale": "scaled = Mul(scores, f(0.3))",
    "mask": "masked = Identity(scaled)",
    "guard": None,
    "values": "o4 = MatMul(weights, v) out = Reshape(o4, i(0,4,-1,8))",
}
SIGNS: dict[str, tuple[dict[str, Any], int]] = {
    "as many as there are new tokens": (fixed(2, 8) | BSKGD, 8),
    "no fixed number, as query heads have": (TOKENS_FIRST | BSKGD | OWN_NAMES, 4),
    "some times a fixed number of new tokens": (FIXED_FOLDED, 4),
}


@pytest.mark.parametrize("sign", TOKENS_SIGNS, ids=lambda sign: sign.meaning)
def test_each_sign_of_the_tokens_axis_is_needed(sign: Sign, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, heads = SIGNS[sign.meaning]
    (site,) = kivi.inspect(decoder(**changes)).sites
    assert (site.q_heads, site.kv_heads) == (heads, 2)
    monkeypatch.setattr(axes, "TOKENS_SIGNS", tuple(other for other in TOKENS_SIGNS if other != sign))
    assert [site.q_heads for site in kivi.inspect(decoder(**changes)).sites] != [heads]


def test_a_grouped_causal_mask_becomes_a_fact() -> None:
    causal = f"{SEEN5} masked = Where(seen5, scaled, f(-3.0e38))"
    (site,) = kivi.inspect(decoder(**GROUPED | {"inputs": {"mask": None}, "mask": causal})).sites
    assert site.is_causal
    assert not site.mask


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "query heads in turn, 5 axes": (
        GROUPED
        | {
            "repeat_key": "k = Unsqueeze(present_0_key, i(1))",
            "repeat_value": "v = Unsqueeze(present_0_value, i(1))",
        },
        "each head repeated for consecutive query heads",
    ),
    "query heads in turn, Einsum": (
        EINSUM
        | {
            "product": 'q5 = Reshape(query, i(0,2,2,-1,8)) scores = Einsum<equation="bgksd,bktd->bgkst">(q5, k)',
            "values": 'o5 = Einsum<equation="bgkst,bktd->bgksd">(weights, v) out = Reshape(o5, i(0,4,-1,8))',
        },
        "each head repeated for consecutive query heads",
    ),
    "values of another head, 5 axes": (
        GROUPED | {"repeat_value": "v = Unsqueeze(present_0_value, i(1))"},
        "MatMul 'o5': expected batch and heads of 'past_0_value'",
    ),
    "values of another head, Einsum": (
        EINSUM | {"values": 'o5 = Einsum<equation="bkgst,bgtd->bkgsd">(weights, v) out = Reshape(o5, i(0,4,-1,8))'},
        "Einsum 'o5': expected batch and heads of 'past_0_value'",
    ),
    "rows for heads, folded": (
        FOLDED
        | {
            "scale": """s1 = Mul(scores, f(0.3)) qs = Shape(query) n = Gather(qs, i(2))
                to = Concat<axis=0>(i(0), n, i(4,-1)) s2 = Reshape(s1, to)
                scaled = Transpose<perm=[0,2,1,3]>(s2)""",
        },
        "no attention family recognizes it",
    ),
    "heads behind the rows, folded": (
        FOLDED
        | {
            "scale": """s1 = Mul(scores, f(0.3)) qs = Shape(query) n = Gather(qs, i(2))
                to = Concat<axis=0>(i(0,2), n, i(2,-1)) scaled = Reshape(s1, to)""",
            "mask": "m5 = Unsqueeze(mask, i(3)) masked = Add(scaled, m5)",
        },
        "not proven to merge or split whole axes",
    ),
    "Einsum over the wrong letter": (
        REPEATED | {"product": 'scores = Einsum<equation="bhsd,bhtd->bhsd">(query, k)'},
        "expected a sum over one axis that both operands have",
    ),
    "Einsum over two letters": (
        REPEATED
        | {
            "product": 'scores = Einsum<equation="bhsd,bhtd->bst">(query, k)',
            "mask": "masked = Identity(scaled)",
        },
        "expected a sum over one axis that both operands have",
    ),
    "Einsum over tokens instead of the head size": (
        REPEATED
        | {
            "inputs": {"query": "float[B,4,S,T] query"},
            "product": 'scores = Einsum<equation="bhst,bhtd->bhsd">(query, k)',
        },
        "got another order of axes",
    ),
    "Einsum with its result transposed": (
        REPEATED | {"product": 'scores = Einsum<equation="bhsd,bhtd->bhts">(query, k)'},
        "got another order",
    ),
    "Einsum with tokens before heads": (
        REPEATED
        | {"product": 'scores = Einsum<equation="bhsd,bhtd->bsht">(query, k)', "mask": "masked = Identity(scaled)"},
        "got another order",
    ),
    "Einsum of weights over the queries": (
        REPEATED | {"values": 'out = Einsum<equation="bhts,bhtd->bhsd">(weights, v)'},
        "expected a sum over the tokens",
    ),
    "Einsum along a diagonal": (
        REPEATED | {"product": 'scores = Einsum<equation="bhsd,hhtd->bhst">(query, k)'},
        "expected a sum over one axis",
    ),
    "Einsum of three tensors": (
        REPEATED
        | {
            "product": """w = Reshape(f(1,2,3,4,5,6,7,8), i(8))
                scores = Einsum<equation="bhsd,bhtd,d->bhst">(query, k, w)"""
        },
        "a product of 3 tensors",
    ),
    "an equation that does not fit": (
        REPEATED
        | {
            "product": 'scores = Einsum<equation="bhsd,btd->bhst">(query, k)',
            "mask": "masked = Identity(scaled)",
        },
        "does not say what becomes of each axis",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    report = kivi.inspect(decoder(**changes))
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report
    with pytest.raises(kivi.UnsupportedModelError, match="can't rewrite"):
        kivi.rewrite(decoder(**changes))


@pytest.mark.parametrize("number", ["inf", "nan", "1e39"])
def test_a_scale_that_no_float_holds_is_a_miss(number: str) -> None:
    model = decoder(scale="big = Cast<to=1>(huge) scaled = Mul(scores, big)")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(float(number)), "huge"))
    report = kivi.inspect(model)
    (miss,) = report.misses
    assert not report.sites
    assert miss.node == "weights"
    assert "scale of the scores is" in miss.reason
    assert "export again" in miss.reason
    with pytest.raises(kivi.UnsupportedModelError, match="scale of the scores is"):
        kivi.rewrite(model)


def test_equations_read_as_their_specification_says() -> None:
    assert read_equation("ab, bc -> ac", [2, 2]) == ((tuple("ab"), tuple("bc")), tuple("ac"))
    assert read_equation("zb,ba", [2, 2]) == ((tuple("zb"), tuple("ba")), tuple("az"))
    assert read_equation("...ij,...jk", [4, 3]) == (
        (("...2", "...1", "i", "j"), ("...1", "j", "k")),
        ("...2", "...1", "i", "k"),
    )
    for equation, ranks in (("ab,bc->ad", [2, 2]), ("ab,bc", [2, 3]), ("ab", [2, 2]), ("a1,b->ab", [2, 1])):
        assert read_equation(equation, ranks) is None
