"""Masks that are understood become attributes and one row per key; those that only look alike stay tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphs
import onnx_kivi as kivi
from graphs import decoder, replay
from mask_graphs import FILL, INPUTS, PADDING, PLACES
from onnx_kivi.patterns.masks import facts
from onnx_kivi.patterns.masks.facts import BLIND_ROWS, BlindRowRule
from onnx_kivi.patterns.masks.predicates import ALWAYS, NEVER, Affine, AtMostZero, Predicate, affine, equivalent
from zoo import MODELS

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order

UNDERSTOOD: dict[str, tuple[str, tuple[bool, int, int]]] = {
    "causal": (f"{PLACES} all = Identity(seen) {FILL}", (True, 0, 0)),
    "causal, from the other side": (f"{PLACES} hidden = Greater(keys, q) all = Not(hidden) {FILL}", (True, 0, 0)),
    "causal, counted from 1": (
        f"{PLACES} after = Add(q, one) all = Less(keys, after) {FILL}",
        (True, 0, 0),
    ),
    "causal and padding": (f"{PLACES} {PADDING} all = And(seen, held4) {FILL}", (True, 0, 1)),
    "padding alone": (f"{PLACES} {PADDING} all = Identity(held4) {FILL}", (False, 0, 1)),
    "window": (
        f"""{PLACES} {PADDING} first = Sub(q, i(3)) near = Greater(keys, first)
        a1 = And(seen, near) all = And(a1, held4) {FILL}""",
        (True, 3, 1),
    ),
    "padding by Gather from a flat mask": (
        f"""{PLACES} ms = Shape(attention_mask) b = Gather(ms, i(0)) rows = Squeeze(b) columns = Gather(ms, i(1))
        r = Range(zero, rows, one) r4 = Unsqueeze(r, i(1,2,3)) k4 = Unsqueeze(keys, i(0,1,2))
        start = Mul(r4, columns) place = Add(start, k4) held = Cast<to=9>(attention_mask)
        flat = Flatten<axis=2>(held) got = Gather<axis=0>(flat, place) to = Shape(place)
        g1 = Reshape(got, i(-1)) held4 = Reshape(g1, to) all = And(seen, held4) {FILL}""",
        (True, 0, 1),
    ),
    "padding by GatherND": (
        f"""{PLACES} ms = Shape(attention_mask) b = Gather(ms, i(0)) rows = Squeeze(b) r = Range(zero, rows, one)
        r4 = Unsqueeze(r, i(1,2,3)) k4 = Unsqueeze(keys, i(0,1,2)) both = Max(r4, k4) to = Shape(both)
        re = Expand(r4, to) ke = Expand(k4, to) r5 = Unsqueeze(re, i(-1)) k5_ = Unsqueeze(ke, i(-1))
        places = Concat<axis=-1>(r5, k5_) held = Cast<to=9>(attention_mask) held4 = GatherND(held, places)
        all = And(seen, held4) {FILL}""",
        (True, 0, 1),
    ),
    "float, by triangles": (
        f"""{PLACES} to = Concat<axis=0>(sn, tn) full = ConstantOfShape<value=float[1] {{-3.0e38}}>(to)
        above = Trilu(full, one) later = Greater(keys, q) laterf = Cast<to=1>(later)
        causal = Mul(above, laterf) c4 = Unsqueeze(causal, i(0,1))
        m4 = Unsqueeze(attention_mask, i(1,2)) mf = Cast<to=1>(m4) sum = Add(c4, mf) empty = Equal(sum, f(0))
        bias = Where(empty, f(-3.0e38), c4) masked = Add(scaled, bias)""",
        (True, 0, 1),
    ),
    "joined with a bias": (
        f"""{PLACES} {PADDING} all = And(seen, held4) hard = Where(all, f(0), f(-3.0e38))
        soft = Reshape(f(0.5,-0.5,1,2), i(1,4,1,1)) bias = Add(soft, hard) masked = Add(scaled, bias)""",
        (True, 0, 2),
    ),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood_masks_become_facts_with_the_same_result(name: str, tmp_path: Path) -> None:
    line, facts = UNDERSTOOD[name]
    model = decoder(inputs=INPUTS, mask=line)
    (site,) = kivi.inspect(model).sites
    assert (site.is_causal, site.window, len(site.mask)) == facts
    for expected, got in replay(model, tmp_path):
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_no_square_mask_is_left() -> None:
    model, _ = kivi.rewrite(decoder(inputs=INPUTS, mask=UNDERSTOOD["causal and padding"][0]))
    assert not {"Range", "LessOrEqual", "And"} & {n.op_type for n in model.graph.node}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    (node,) = (n for n in model.graph.node if n.op_type == "QuantizedKvSdpa")
    (mask,) = (v for v in inferred.graph.value_info if v.name == node.input[3])
    assert [d.dim_value for d in mask.type.tensor_type.shape.dim][1:3] == [1, 1]


LOOKALIKES: dict[str, str] = {
    "one key too many": f"{PLACES} more = Add(q, one) all = LessOrEqual(keys, more) {FILL}",
    "without the query's own key": f"{PLACES} z = Equal(keys, i(0)) less = Less(keys, q) all = Or(less, z) {FILL}",
    "counted from 0": f"""{PLACES} local = Range(zero, s, one) l1 = Unsqueeze(local, i(1))
        all = LessOrEqual(keys, l1) {FILL}""",
    "a prefix that all see": f"{PLACES} prefix = Less(keys, i(2)) all = Or(seen, prefix) {FILL}",
    "window without causal": f"{PLACES} first = Sub(q, i(3)) all = Greater(keys, first) {FILL}",
    "causal or padding": f"{PLACES} {PADDING} all = Or(seen, held4) {FILL}",
    "padding of the query": f"""{PLACES} {PADDING} late = Slice(held, pn, tn, i(1)) l4 = Unsqueeze(late, i(1,3))
        own = Equal(keys, i(0)) rows = Or(l4, own) all = And(seen, rows) {FILL}""",
    "padding shifted by one": f"""{PLACES} minus = Sub(keys, i(1)) at = Max(minus, i(0))
        held = Cast<to=9>(attention_mask) h = Gather<axis=1>(held, at) held4 = Unsqueeze(h, i(1,2))
        all = And(seen, held4) {FILL}""",
    "a fill that does not hide": f"{PLACES} bias = Where(seen, f(0), f(-5)) masked = Add(scaled, bias)",
    "two fills": f"""{PLACES} {PADDING} b1 = Where(seen, f(0), f(-3.0e38)) b2 = Where(held4, b1, f(-2.0e38))
        masked = Add(scaled, b2)""",
    "a bonus for what is seen": f"{PLACES} bias = Where(seen, f(1), f(-3.0e38)) masked = Add(scaled, bias)",
}


@pytest.mark.parametrize("name", LOOKALIKES)
def test_lookalikes_stay_tensors_with_the_same_result(name: str, tmp_path: Path) -> None:
    model = decoder(inputs=INPUTS, mask=LOOKALIKES[name])
    (site,) = kivi.inspect(model).sites
    assert (site.is_causal, site.window) == (False, 0)
    assert len(site.mask) == 1
    for expected, got in replay(model, tmp_path):
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_a_slice_along_an_axis_that_is_a_size_is_not_read() -> None:
    line = f"{PLACES} all = Slice(seen, i(0), tn, sn) {FILL}"
    assert not any(site.is_causal for site in kivi.inspect(decoder(inputs=INPUTS, mask=line)).sites)


def test_elements_of_a_constant_are_not_read() -> None:
    """A Gather of what no node made of a matrix."""
    line = f"{PLACES} table = Constant<value=bool[2] {{1,0}}>() all = Gather(table, keys) {FILL}"
    assert not any(site.is_causal for site in kivi.inspect(decoder(inputs=INPUTS, mask=line)).sites)


# One key a new token: right behind nothing, and repeated over all keys for a single token; no chunk of them runs.
REPEATED: dict[str, str] = {
    "repeated over all": f"""{PLACES} own = Range(zero, s, one) l1 = LessOrEqual(own, q)
        to = Concat<axis=0>(sn, tn) all = Expand(l1, to) {FILL}""",
    "beside all": f"""{PLACES} own = Range(zero, s, one) l1 = LessOrEqual(own, q)
        some = Equal(keys, keys) all = And(some, l1) {FILL}""",
    "cut where all end": f"""{PLACES} own = Range(zero, s, one) l1 = LessOrEqual(own, q)
        all = Slice(l1, i(0), tn, i(1)) {FILL}""",
}


@pytest.mark.parametrize("name", REPEATED)
def test_a_mask_of_new_tokens_alone_is_not_read_as_one_of_all_keys(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "STEPS", (5, 1, 1))
    model = decoder(inputs=INPUTS, mask=REPEATED[name])
    (site,) = kivi.inspect(model).sites
    assert (site.is_causal, len(site.mask)) == (False, 1)
    for expected, got in replay(model, tmp_path):
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def literals() -> st.SearchStrategy[AtMostZero]:
    numbers = st.integers(-2, 2)
    return st.builds(lambda c, i, j: AtMostZero(affine(c, {0: i, 1: j})), numbers, numbers, numbers)


def truths() -> st.SearchStrategy[Predicate]:
    single = literals().map(lambda literal: Predicate(frozenset({frozenset({literal})})))
    pairs = st.sampled_from([Predicate.and_, Predicate.or_])
    return st.recursive(
        single | st.sampled_from([ALWAYS, NEVER]),
        lambda x: st.builds(lambda join, a, b: join(a, b), pairs, x, x) | x.map(Predicate.negated),
        max_leaves=5,
    )


def table(truth: Predicate) -> Any:
    """Value at each pair of indices from -4 to 4."""
    i, j = np.mgrid[-4:5, -4:5]
    out = np.zeros(i.shape, bool)
    for case in truth.cases:
        hit = np.ones(i.shape, bool)
        for literal in case:
            assert isinstance(literal, AtMostZero)
            steps: dict[int, Any] = dict(literal.of.steps)
            hit &= literal.of.const + steps.get(0, 0) * i + steps.get(1, 0) * j <= 0
        out |= hit
    return out


@given(truths(), truths())
def test_conditions_compute_like_booleans(x: Predicate, y: Predicate) -> None:
    np.testing.assert_array_equal(table(x.and_(y)), table(x) & table(y))
    np.testing.assert_array_equal(table(x.or_(y)), table(x) | table(y))
    np.testing.assert_array_equal(table(x.negated()), ~table(x))
    if equivalent(x, y):
        np.testing.assert_array_equal(table(x), table(y))


@given(literals().filter(lambda literal: literal.of.steps))
def test_a_condition_is_equivalent_to_what_implies_it(literal: AtMostZero) -> None:
    one = Predicate(frozenset({frozenset({literal})}))
    wider = Predicate(frozenset({frozenset({AtMostZero(literal.of.plus(Affine(-1)))})}))
    assert equivalent(one.and_(wider), one)
    assert equivalent(one.or_(wider), wider)
    assert not equivalent(one, wider)


BLIND = {
    "the original makes zeros of NaN, or has no -inf": "dynamo-18/llama",
    "it is hidden by what hid it before": "genai-fp32/llama",
    "it keeps a finite mask beside the attributes, or sees itself": "legacy-17/llama",
    "-inf may hide all of it, where a finite fill kept it finite": "optimum/bloom",
}


@pytest.mark.parametrize("rule", BLIND_ROWS, ids=lambda rule: rule.case)
def test_each_rule_for_rows_that_see_no_key_is_needed(rule: BlindRowRule, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> set[bool]:
        return {site.nan_to_zero for site in kivi.inspect(MODELS[BLIND[rule.case]]).sites}

    assert found() == {rule.nan_to_zero}
    without = tuple(other for other in BLIND_ROWS if other != rule)
    otherwise = BlindRowRule("none of the others", "", lambda _: True, not rule.nan_to_zero)
    monkeypatch.setattr(facts, "BLIND_ROWS", (*without, otherwise))
    assert found() == {not rule.nan_to_zero}
