"""Written-out attention in the spellings of exporters: changes to `graphs.decoder`, by what they change."""

from __future__ import annotations

from typing import Any

from graphs import ONE_KV_HEAD

SPELLINGS: dict[str, dict[str, Any]] = {
    "past turned before it is joined, and back": {
        "join_key": """beside = Transpose<perm=[0,2,1,3]>(past_0_key) old = Transpose<perm=[1,0,2,3]>(beside)
            new = Transpose<perm=[2,0,1,3]>(key)
            whole = Concat<axis=0>(old, new) present_0_key = Transpose<perm=[1,2,0,3]>(whole)"""
    },
    "past turned, and read as it was joined": {
        "join_value": """old = Transpose<perm=[0,2,1,3]>(past_0_value) new = Transpose<perm=[0,2,1,3]>(value)
            whole = Concat<axis=1>(old, new) present_0_value = Transpose<perm=[0,2,1,3]>(whole)
            straight = Transpose<perm=[0,2,1,3]>(whole)""",
        "repeat_value": "v5 = Unsqueeze(straight, i(2)) v6 = Expand(v5, i(1,1,2,1,1)) v = Reshape(v6, i(0,4,-1,8))",
    },
    "as exporters write it": {},
    "scale on the query": {"product": "q = Mul(query, f(0.3)) scaled = MatMul(q, kt)", "scale": None},
    "scale split over query and key": {
        "product": "q = Mul(query, f(0.5)) kr = Mul(kt, f(0.6)) scaled = MatMul(q, kr)",
        "scale": None,
    },
    "scale by division": {"scale": "scaled = Div(scores, f(3.0))"},
    "scale from shapes": {
        "scale": "qs = Shape(query) d = Gather(qs, i(3)) df = Cast<to=1>(d) root = Sqrt(df) scaled = Div(scores, root)"
    },
    "terms between two scales": {
        "scale": """s1 = Mul(scores, f(0.5)) bias = Reshape(f(0.1,0.2,0.3,0.4), i(1,4,1,1))
            s2 = Add(s1, bias) added = Add(s2, mask)""",
        "mask": "masked = Div(added, f(3.0))",
    },
    "two terms, sides swapped": {
        "mask": "bias = Reshape(f(0.1,0.2,0.3,0.4), i(1,4,1,1)) m1 = Add(bias, scaled) masked = Add(m1, mask)"
    },
    "term of fewer axes": {"inputs": {"mask": "float[S,T] mask"}},
    "where, condition keeps": {
        "inputs": {"mask": "bool[B,1,S,T] seen"},
        "mask": "masked = Where(seen, scaled, f(-3.0e38))",
    },
    "where, condition hides": {
        "inputs": {"mask": "bool[B,1,S,T] seen"},
        "mask": "hidden = Not(seen) masked = Where(hidden, f(-3.0e38), scaled)",
    },
    "where, a fill of -1e9": {
        "inputs": {"mask": "bool[B,1,S,T] seen"},
        "mask": "masked = Where(seen, scaled, f(-1e9))",
    },
    "masked scores raised to a floor": {"mask": "m1 = Add(scaled, mask) masked = Max(m1, f(-3.4028235e38))"},
    "a floor, sides swapped, under a mask": {"scale": "s1 = Max(f(-3e38), scores) scaled = Mul(s1, f(0.3))"},
    "heads repeated by Tile": {
        side: f"{v}5 = Unsqueeze({cache}, i(2)) {v}6 = Tile({v}5, i(1,1,2,1,1)) {v} = Reshape({v}6, i(0,4,-1,8))"
        for side, v, cache in (("repeat_key", "k", "present_0_key"), ("repeat_value", "v", "present_0_value"))
    },
    "heads repeated by Tile over their tokens": {
        "repeat_key": "k5 = Tile(present_0_key, i(1,1,2,1)) k = Reshape(k5, i(0,4,-1,8))"
    },
    "nan guard": {
        "guard": "bad = IsNaN(weights) clean = Where(bad, f(0), weights)",
        "values": "out = MatMul(clean, v)",
    },
    "softcap": {"scale": "s1 = Mul(scores, f(0.3)) s2 = Div(s1, f(2)) s3 = Tanh(s2) scaled = Mul(s3, f(2))"},
    "softmax written out": {
        "softmax": """top = ReduceMax(masked, i(-1)) less = Sub(masked, top) e = Exp(less)
            all = ReduceSum(e, i(3)) weights = Div(e, all)""",
        "guard": "half = Cast<to=10>(weights) bad = IsNaN(half) clean = Where(bad, f(0), weights)",
        "values": "out = MatMul(clean, v)",
    },
    "softcap that rescales": {"scale": "s2 = Div(scores, f(2)) s3 = Tanh(s2) scaled = Mul(s3, f(-0.3))"},
    "softcap scaled by the product": {
        "domains": ', "com.microsoft": 1',
        "product": "s2 = com.microsoft.FusedMatMul<alpha=0.15>(query, kt)",
        "scale": "s3 = Tanh(s2) scaled = Mul(s3, f(2))",
    },
    "sink logits": {
        "mask": """m1 = Add(scaled, mask) sinks = Reshape(f(0.5,-0.5,1,2), i(1,4,1,1))
            qs = Shape(query) b = Gather(qs, i(0)) s = Gather(qs, i(2)) to = Concat<axis=0>(b, i(4), s, i(1))
            column = Expand(sinks, to) joined = Concat<axis=-1>(m1, column)
            top = ReduceMax(joined, i(-1)) masked = Sub(joined, top)""",
        "guard": "kept = Slice(weights, i(0), i(-1), i(3))",
        "values": "out = MatMul(kept, v)",
    },
    "casts and a concat of one": {
        "join_key": """p1 = Concat<axis=2>(past_0_key) p2 = Cast<to=1>(p1)
            present_0_key = Concat<axis=2>(p2, key)""",
        "guard": "w1 = Cast<to=1>(weights) w2 = Identity(w1)",
        "values": "out = MatMul(w2, v)",
    },
    "present by cast": {
        "join_key": "joined = Concat<axis=2>(past_0_key, key) present_0_key = Cast<to=1>(joined)",
        "repeat_key": "k5 = Unsqueeze(joined, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) k = Reshape(k6, i(0,4,-1,8))",
    },
    "key transposed through 3 axes": {
        "transpose": """ks = Shape(k)
            b = Gather(ks, i(0)) h = Gather(ks, i(1)) t = Gather(ks, i(2)) d = Gather(ks, i(3))
            flat = Concat<axis=0>(i(-1), t, d) k3 = Reshape(k, flat) k3t = Transpose<perm=[0,2,1]>(k3)
            back = Concat<axis=0>(b, h, d, t) kt = Reshape(k3t, back)"""
    },
    "products of 3 axes": {
        "repeat_key": """k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) k4 = Reshape(k6, i(0,4,-1,8))
            ks = Shape(k4) t = Gather(ks, i(2)) flat = Concat<axis=0>(i(-1), t, i(8)) k = Reshape(k4, flat)""",
        "repeat_value": """v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1))
            v4 = Reshape(v6, i(0,4,-1,8)) v = Reshape(v4, flat)""",
        "transpose": "kt = Transpose<perm=[0,2,1]>(k)",
        "product": """qs = Shape(query) b = Gather(qs, i(0)) s = Gather(qs, i(2))
            to3 = Concat<axis=0>(i(-1), s, i(8)) q3 = Reshape(query, to3) scores = MatMul(q3, kt)""",
        "mask": "up = Concat<axis=0>(i(-1), i(4), s, t) s4 = Reshape(scaled, up) masked = Add(s4, mask)",
        "guard": "down = Concat<axis=0>(i(-1), s, t) w3 = Reshape(weights, down)",
        "values": "o3 = MatMul(w3, v) to4 = Concat<axis=0>(b, i(4), s, i(8)) out = Reshape(o3, to4)",
    },
    "one kv head, broadcast": ONE_KV_HEAD,
    "cache as (batch, tokens, heads, size)": {
        "inputs": {"key": "float[B,S,2,8] key", "past_key": "float[B,P,2,8] past_0_key"},
        "outputs": {"present_key": "float[B,T,2,8] present_0_key"},
        "join_key": "present_0_key = Concat<axis=1>(past_0_key, key) bhtd = Transpose<perm=[0,2,1,3]>(present_0_key)",
        "repeat_key": "k5 = Unsqueeze(bhtd, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) k = Reshape(k6, i(0,4,-1,8))",
    },
    "cache as (batch, heads, size, tokens)": {
        "inputs": {"key": "float[B,2,8,S] key", "past_key": "float[B,2,8,P] past_0_key"},
        "outputs": {"present_key": "float[B,2,8,T] present_0_key"},
        "join_key": "present_0_key = Concat<axis=3>(past_0_key, key)",
        "repeat_key": "k5 = Unsqueeze(present_0_key, i(2)) k6 = Expand(k5, i(1,1,2,1,1)) kt = Reshape(k6, i(0,4,8,-1))",
        "transpose": None,
    },
    "values narrower than keys": {
        "inputs": {"value": "float[B,2,S,5] value", "past_value": "float[B,2,P,5] past_0_value"},
        "outputs": {"present_value": "float[B,2,T,5] present_0_value", "out": "float[B,4,S,5] out"},
        "repeat_value": """v5 = Unsqueeze(present_0_value, i(2)) v6 = Expand(v5, i(1,1,2,1,1))
            v = Reshape(v6, i(0,4,-1,5))""",
    },
    "opset 11": {
        "opset": 11,
        "repeat_key": """k5 = Unsqueeze<axes=[2]>(present_0_key) k6 = Expand(k5, i(1,1,2,1,1))
            k = Reshape(k6, i(0,4,-1,8))""",
        "repeat_value": """v5 = Unsqueeze<axes=[2]>(present_0_value) v6 = Expand(v5, i(1,1,2,1,1))
            v = Reshape(v6, i(0,4,-1,8))""",
        "softmax": "weights = Softmax<axis=3>(masked)",
        "inputs": {"mask": "float[S,T] mask"},
    },
    "FusedMatMul": {
        "domains": ', "com.microsoft": 1',
        "transpose": None,
        "product": "scaled = com.microsoft.FusedMatMul<alpha=0.3, transB=1>(query, k)",
        "scale": None,
    },
    "scale applied twice": {"product": "q = Mul(query, f(0.5)) scores = MatMul(q, kt)"},
    "a second attention over the same cache": {
        "outputs": {"second": "float[B,4,S,8] second"},
        "values": """out = MatMul(weights, v)
            s2 = Mul(scores, f(2)) w2 = Softmax<axis=-1>(s2) second = MatMul(w2, v)""",
    },
}
