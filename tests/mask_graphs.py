"""Pieces of masks as graph text: the positions, the padding, the fill."""

from __future__ import annotations

INPUTS = {"mask": "int64[B,T] attention_mask"}
PLACES = """qs = Shape(query) ps = Shape(past_0_key) sn = Gather(qs, i(2)) pn = Gather(ps, i(2)) tn = Add(pn, sn)
    s = Squeeze(sn) p = Squeeze(pn) t = Squeeze(tn) zero = Squeeze(i(0)) one = Squeeze(i(1))
    queries = Range(p, t, one) keys = Range(zero, t, one) q = Unsqueeze(queries, i(1))
    seen = LessOrEqual(keys, q)"""
PADDING = "held = Cast<to=9>(attention_mask) held4 = Unsqueeze(held, i(1,2))"
FILL = "masked = Where(all, scaled, f(-3.0e38))"
