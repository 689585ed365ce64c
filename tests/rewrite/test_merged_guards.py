"""Merged decoders that can't be taken apart: a near miss for every guard, refused with its reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_kivi as kivi
from merged_graphs import ELSE_LINES, THEN_LINES, merged


def computed_flag(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, onnx.helper.make_node("Not", ["use_cache_branch"], ["turned"], name="not"))
    model.graph.node[1].input[0] = "turned"


def flag_read_elsewhere(model: onnx.ModelProto) -> None:
    model.graph.node.append(onnx.helper.make_node("Identity", ["use_cache_branch"], ["seen"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("seen", onnx.TensorProto.BOOL, [1]))


def swapped(model: onnx.ModelProto) -> None:
    first, second = model.graph.node[0].attribute
    first.name, second.name = second.name, first.name


def without_else(model: onnx.ModelProto) -> None:
    del model.graph.node[0].attribute[0]


def two_and_three(model: onnx.ModelProto) -> None:
    for name, number in (("two_f", 2), ("three_f", 3)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(number, np.float32), name))


def graph_inside(model: onnx.ModelProto) -> None:
    body = onnx.parser.parse_graph("g () => (float[B,E,32] y) { y = Identity(key3) }")
    other = onnx.parser.parse_graph("g () => (float[B,E,32] z) { z = Neg(key3) }")
    branch = next(a.g for a in model.graph.node[0].attribute if a.name == "else_branch")
    index = next(i for i, node in enumerate(branch.node) if "key3" in node.input)
    branch.node[index].input[0] = "key3_chosen"
    choice = onnx.helper.make_node("If", ["sure"], ["key3_chosen"], name="if", then_branch=body, else_branch=other)
    branch.node.insert(index, choice)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([True]), "sure"))


ONE_MODEL = "in the branch with a past and .* in the other are not the same: the branches are not one model"
NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "a computed flag": (
        {"change": computed_flag},
        "expected an input to choose .* got 'turned', which Not 'not' makes",
    ),
    "a flag with another use": ({"change": flag_read_elsewhere}, "'use_cache_branch', .* is read elsewhere too"),
    "branches the other way round": ({"change": swapped}, "expected a branch for false that has no past, got one that"),
    "a branch that is missing": ({"change": without_else}, "expected else_branch to give 5 tensors"),
    "another weight": (
        {
            "then_query": "projected = MatMul(query, other)",
            "change": lambda model: model.graph.initializer.append(
                onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "other")
            ),
        },
        ONE_MODEL,
    ),
    "the same weight read otherwise": (
        {"then_query": "projected = Add(query, weight)", "inputs": {"query": "float[B,4,8,8] query"}},
        ONE_MODEL,
    ),
    "a weight less": (
        {"else_query": "projected = Identity(query)"},
        ONE_MODEL,
    ),
    "a weight more": (
        {
            "else_query": "once = MatMul(query, weight) projected = MatMul(once, other)",
            "change": lambda model: model.graph.initializer.append(
                onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "other")
            ),
        },
        ONE_MODEL,
    ),
    "another scale": (
        {"then_query": "once = MatMul(query, weight) projected = Mul(once, two_f)"}
        | {"else_query": "once = MatMul(query, weight) projected = Mul(once, three_f)", "change": two_and_three},
        "two_f in the branch with a past and three_f in the other are not the same",
    ),
    "another place in a list": (
        {"else_query": "all = MatMul(query, weight) projected = Gather<axis=2>(all, two)"}
        | {"then_query": "all = MatMul(query, weight) projected = Gather<axis=2>(all, one)"},
        "one in the branch with a past and two in the other are not the same",
    ),
    "other tokens": (
        {
            "inputs": {"ids": "int64[B,4,S] ids", "others": "int64[B,4,S] others"},
            "then_query": "more = Gather(weight, ids) moved = Add(query, more) projected = MatMul(moved, weight)",
            "else_query": "more = Gather(weight, others) moved = Add(query, more) projected = MatMul(moved, weight)",
        },
        "ids in the branch with a past and others in the other are not the same",
    ),
    "another axis": (
        {"else_self": "weights = Softmax<axis=2>(scores) attended = MatMul(weights, present_0_value)"},
        "Softmax .* in the branch with a past and Softmax .* in the other are not the same",
    ),
    "values in the place of keys": (
        {"else_scores": ELSE_LINES["scores"].replace("present_0_key", "present_0_value")},
        ONE_MODEL,
    ),
    "keys that are turned otherwise": (
        {
            "then_scores": THEN_LINES["scores"].replace("MatMul(projected, turned)", "MatMul(turned, turned)"),
            "else_scores": ELSE_LINES["scores"].replace("MatMul(projected, turned)", "MatMul(present_0_key, turned)"),
        },
        ONE_MODEL,
    ),
    "another encoder's keys": (
        {"else_cross": ELSE_LINES["cross"].replace("present_0_encoder_key", "present_0_encoder_value")},
        ONE_MODEL,
    ),
    "keys made of tokens too": (
        {"else_query": ELSE_LINES["query"] + " some = ReduceMax(query) more = Add(states, some)"}
        | {"else_encoder": ELSE_LINES["encoder"].replace("MatMul(states", "MatMul(more")},
        "made of 'states' alone, got query",
    ),
    "two inputs that may be the encoder's": (
        {"inputs": {"more": "float[B,E,16] more"}}
        | {"else_encoder": ELSE_LINES["encoder"].replace("states", "both") + " "}
        | {"else_query": ELSE_LINES["query"] + " both = Add(states, more)"},
        r"expected one input \(batch, tokens, width\) of an encoder, got states, more",
    ),
    "keys of fewer tokens": (
        {"else_query": ELSE_LINES["query"] + " fewer = Slice(states, first, last, last)"}
        | {"else_encoder": ELSE_LINES["encoder"].replace("MatMul(states", "MatMul(fewer")},
        "expected keys and values of as many tokens as 'states' has",
    ),
    "a graph in what makes the keys": ({"change": graph_inside}, "expected plain nodes to make"),
    "no mask for several tokens": (
        {
            f"{branch}_scores": lines["scores"].replace("Add(product, mask)", "Identity(product)")
            for branch, lines in (("then", THEN_LINES), ("else", ELSE_LINES))
        },
        "its mask is not known to hide later tokens: a prompt needs the branch without a past of choice",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    model = merged(**changes)
    for cross in (False, True):
        report = kivi.inspect(model, cross=cross)
        assert not report.sites
        assert any(re.search(reason, miss.reason) for miss in report.misses), report
        with pytest.raises(kivi.UnsupportedModelError, match=reason):
            kivi.rewrite(model, kivi.KiviConfig(cross=cross), partial=True)


def test_a_refusal_names_the_decoder_beside_it(tmp_path: Path) -> None:
    for name in ("a computed flag", "no mask for several tokens"):
        onnx.save(merged(**NEAR_MISSES[name][0]), tmp_path / "decoder_model_merged.onnx")
        (tmp_path / "decoder_with_past_model.onnx").unlink(missing_ok=True)
        (miss, *_) = kivi.inspect(tmp_path / "decoder_model_merged.onnx").misses
        assert "beside" not in miss.reason
        (tmp_path / "decoder_with_past_model.onnx").touch()
        (miss, *_) = kivi.inspect(tmp_path / "decoder_model_merged.onnx").misses
        assert miss.reason.endswith("; rewrite decoder_with_past_model.onnx, which lies beside it")


def test_states_that_each_step_reads_are_stored_by_none() -> None:
    extra = " shown = ReduceMean(states) out = Add(plain, shown)"
    lines: dict[str, Any] = {"then": THEN_LINES, "else": ELSE_LINES}
    changes: dict[str, Any] = {f"{b}_cross": lines[b]["cross"].replace("out =", "plain =") + extra for b in lines}
    model = merged(**changes)
    with pytest.raises(kivi.UnsupportedModelError, match="reads 'states' too, which most steps leave empty"):
        kivi.rewrite(model, kivi.KiviConfig(cross=True))
    assert len(kivi.rewrite(model)[1].sites) == 1
