"""Merged decoders: the branch with a past on an empty cache is the other one, and what can't be is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import onnx_kivi as kivi
from limits import EIGHT_BITS, ROUNDING, difference, original_stepper
from merged_graphs import CROSS, ELSE_LINES, THEN_LINES, merged
from onnx_kivi.measure.synthetic import synthetic_stepper
from onnx_kivi.run.session import open_model
from onnx_kivi.run.stepper import Stepper
from zoo import MODELS

Array = npt.NDArray[Any]
Opener = Callable[[Path], kivi.Session]

ZOO = [name for name in MODELS if "merged" in name]
CROSSED = [name for name in ZOO if name.startswith("optimum/")]
BOTH = [(name, cross) for name in ZOO for cross in (False, True) if not cross or name in CROSSED]
EACH = ["optimum/whisper/decoder_model_merged", "optimum/t5/decoder_model_merged", "optimum-merged/gpt2"]
STEPS = (6, 3, 1, 1, 1)
SEALING = (40, 5, 1, 1, 1)
BLOCK = 8


def rewritten(model: onnx.ModelProto | Path, folder: Path, bits: int, *, cross: bool) -> Path:
    path = folder / "model.onnx"
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(bits, bits, BLOCK, 64, 0, 0, cross=cross))[0], path)
    return path


def differences(original: Stepper, ours: Stepper, steps: tuple[int, ...]) -> list[float]:
    """Of the logits, the first step with all its tokens in the branch without a past."""
    ids = np.random.default_rng(3).integers(3, 100, (2, sum(steps)))
    mask = np.ones_like(ids)
    found, start = [], 0
    for count in steps:
        end = start + count
        expected, got = (each.step(ids[:, start:end], mask[:, :end]) for each in (original, ours))
        found.append(difference(expected, got))
        start = end
    return found


def inputs(session: kivi.Session) -> set[str]:
    return {i.name for i in session.get_inputs()}


def test_the_zoo_has_merged_decoders() -> None:
    assert len(CROSSED) >= 4
    assert len(ZOO) > len(CROSSED)


@pytest.mark.parametrize(("name", "cross"), BOTH)
def test_a_first_step_of_several_tokens_and_all_others_are_the_originals(
    name: str, cross: bool, tmp_path: Path
) -> None:
    session = kivi.Session(rewritten(MODELS[name], tmp_path, 32, cross=cross))
    ours = synthetic_stepper(session, session.cache, batch=2)
    assert max(differences(original_stepper(MODELS[name], 2), ours, STEPS)) <= ROUNDING


@pytest.mark.parametrize(("name", "cross"), [(name, name in CROSSED) for name in EACH])
def test_at_8_bits_they_are_near_and_not_identical(name: str, cross: bool, tmp_path: Path) -> None:
    session = kivi.Session(rewritten(MODELS[name], tmp_path, 8, cross=cross))
    original = synthetic_stepper(open_model(MODELS[name]), batch=2, encoder_tokens=2 * BLOCK)
    ours = synthetic_stepper(session, session.cache, batch=2, encoder_tokens=2 * BLOCK)
    first, *later = differences(original, ours, SEALING)
    assert session.cache.sealed_tokens >= 2 * BLOCK
    assert first <= ROUNDING
    assert 0 < max(later) <= EIGHT_BITS


@pytest.mark.parametrize("name", EACH)
def test_what_the_host_feeds(name: str, tmp_path: Path) -> None:
    """Without cross the encoder's keys and values go out and in as they did; with it the states fill the slots once."""
    original = {i.name for i in open_model(MODELS[name]).get_inputs()}
    crossed = {n for n in original if "past" in n and "encoder" in n}
    plain = {n for n in original if "past" not in n}
    flag = {"use_cache_branch"}
    kept = kivi.Session(rewritten(MODELS[name], tmp_path, 32, cross=False))
    assert inputs(kept) == (plain | crossed if crossed else plain - flag)
    assert len(kept.get_outputs()) == 1 + len(crossed)
    stored = kivi.Session(rewritten(MODELS[name], tmp_path, 32, cross=True))
    assert inputs(stored) == plain - flag
    assert [o.name for o in stored.get_outputs()] == ["logits"]


@pytest.mark.parametrize("cross", [False, True])
def test_generate_takes_an_encoders_states(cross: bool, tmp_path: Path, open_session: Opener) -> None:
    session = open_session(rewritten(MODELS["optimum/bart/decoder_model_merged"], tmp_path, 32, cross=cross))
    states = np.random.default_rng(0).standard_normal((1, 9, 32), np.float32)
    given: dict[str, Array] = {"encoder_hidden_states": states, "encoder_attention_mask": np.ones((1, 9), np.int64)}
    tokens = [*session.generate([1, 5, 7], max_new_tokens=8, inputs=given)]
    original = Stepper(open_model(MODELS["optimum/bart/decoder_model_merged"]), given=given)
    ids = [1, 5, 7]
    for _ in range(8):
        new = np.array([ids[original.length :]])
        ids.append(int(original.step(new)[0, -1].argmax()))
    assert tokens == ids[3:]


@pytest.mark.parametrize("name", EACH[:2])
def test_verification_passes_and_finds_a_wrong_scale(name: str, tmp_path: Path) -> None:
    path = rewritten(MODELS[name], tmp_path, 8, cross=True)
    checked = kivi.verify(MODELS[name], path)
    assert checked.ok, checked.reason
    assert checked.sealed_tokens > 0
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "scale":
                attribute.s = str(float(attribute.s) * 1.1).encode()
    onnx.save(model, path)
    assert not kivi.verify(MODELS[name], path).ok


SPELLINGS: dict[str, dict[str, Any]] = {
    "as optimum has it": {},
    "tokens last": {
        "else_encoder": """key3 = MatMul(states, key_weight) value3 = MatMul(states, value_weight)
            key_turned = Transpose<perm=[0,2,1]>(key3) value_turned = Transpose<perm=[0,2,1]>(value3)
            tokens = Shape(query) batch = Gather(tokens, zero) batches = Unsqueeze(batch, first)
            shape = Concat<axis=0>(batches, heads, heads8, minus)
            key4 = Reshape(key_turned, shape) present_0_encoder_key = Transpose<perm=[0,1,3,2]>(key4)
            value4 = Reshape(value_turned, shape) present_0_encoder_value = Transpose<perm=[0,1,3,2]>(value4)"""
    },
    "heads left to be found": {
        "else_query": ELSE_LINES["query"]
        + " seen = Shape(states) size1 = Gather(seen, one) held = Unsqueeze(size1, first)",
        "else_encoder": ELSE_LINES["encoder"].replace("batches, minus, heads, heads8", "batches, held, minus, heads8"),
    },
}


def first_and_later(model: onnx.ModelProto, session: kivi.Session) -> list[tuple[Array, Array]]:
    """(original, rewritten) outputs of a first step of 5 tokens, which alone brings states, and of two more."""
    original, rng = open_model(model.SerializeToString()), np.random.default_rng(0)
    states = rng.standard_normal((2, 11, 16), np.float32)
    names = [o.name for o in original.get_outputs()]
    past = {i.name: np.zeros((2, 4, 0, 8), np.float32) for i in original.get_inputs() if i.name.startswith("past")}
    found: list[tuple[Array, Array]] = []
    for count in (5, 3, 1):
        new = {name: rng.standard_normal((2, 4, count, 8), np.float32) for name in ("query", "key", "value")}
        given = {} if "states" not in {i.name for i in original.get_inputs()} else {"states": states}
        flag = {"use_cache_branch": np.array([bool(found)])}
        results = dict(zip(names, original.run(None, new | given | flag | past), strict=True))
        ours = new | ({} if found else given)
        found.append((results["out"], session.run(["out"], ours)[0]))
        carried = [name for name in past if "encoder" not in name or len(found) == 1]
        past |= {name: results[name.replace("past", "present")] for name in carried}
    return found


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_template_is_rewritten(spelling: str, encoder: bool, tmp_path: Path) -> None:
    model = merged(encoder=encoder, **SPELLINGS[spelling] if encoder else {})
    session = kivi.Session(rewritten(model, tmp_path, 32, cross=True))
    assert len(session.nodes.slots) == 1 + encoder
    for expected, found in first_and_later(model, session):
        assert difference(expected, found) <= ROUNDING


def test_other_weights_of_the_encoders_keys_are_another_model() -> None:
    ids = set()
    for factor in (1, 2):
        model = merged()
        (weight,) = (t for t in model.graph.initializer if t.name == "key_weight")
        weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * factor, weight.name))
        result, _ = kivi.rewrite(model, kivi.KiviConfig(cross=True))
        ids |= {a.s for node in result.graph.node for a in node.attribute if a.name == "model_id"}
    assert len(ids) == 2


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


def graph_inside(model: onnx.ModelProto) -> None:
    body = onnx.parser.parse_graph("g () => (float[B,E,32] y) { y = Identity(key3) }")
    other = onnx.parser.parse_graph("g () => (float[B,E,32] z) { z = Neg(key3) }")
    branch = next(a.g for a in model.graph.node[0].attribute if a.name == "else_branch")
    index = next(i for i, node in enumerate(branch.node) if "key3" in node.input)
    branch.node[index].input[0] = "key3_chosen"
    choice = onnx.helper.make_node("If", ["sure"], ["key3_chosen"], name="if", then_branch=body, else_branch=other)
    branch.node.insert(index, choice)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([True]), "sure"))


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
        "only one of the branches has MatMul read 'other': they are not the same model",
    ),
    "the same weight read otherwise": (
        {"then_query": "projected = Add(query, weight)", "inputs": {"query": "float[B,4,8,8] query"}},
        "only one of the branches has Add read 'weight'",
    ),
    "a weight less": (
        {"else_query": "projected = Identity(query)"},
        "only one of the branches has MatMul read 'weight'",
    ),
    "a weight more": (
        {
            "else_query": "once = MatMul(query, weight) projected = MatMul(once, other)",
            "change": lambda model: model.graph.initializer.append(
                onnx.numpy_helper.from_array(np.ones((8, 8), np.float32), "other")
            ),
        },
        "only one of the branches has MatMul read 'other': they are not the same model",
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
        {"then_scores": THEN_LINES["scores"].replace("Add(product, mask)", "Identity(product)")},
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
    line = (
        CROSS.replace("KEY", "past_0_encoder_key").replace("VALUE", "past_0_encoder_value").replace("out =", "plain =")
    )
    model = merged(then_cross=line + extra)
    with pytest.raises(kivi.UnsupportedModelError, match="reads 'states' too, which most steps leave empty"):
        kivi.rewrite(model, kivi.KiviConfig(cross=True))
    assert len(kivi.rewrite(model)[1].sites) == 1
