"""The family `gqa`: GroupQueryAttention, in every form that the CPU kernel runs, gives the original's result."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
from graphs import decoder, feeds, replay

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order
HALF_ROUNDING = 2**-10  # a last bit of float16, wherever the kernel rounds
GONE: dict[str, Any] = dict.fromkeys(
    ("join_key", "join_value", "repeat_key", "repeat_value", "transpose", "product", "scale", "mask", "softmax")
)
INPUTS = {
    "query": "float[B,S,64] query",
    "key": "float[B,S,32] key",
    "value": "float[B,S,32] value",
    "mask": "int32[B] seqlens_k",
    "total": "int32 total_length",
    "past_key": "float[B,2,P,16] past_0_key",
    "past_value": "float[B,2,P,16] past_0_value",
}
OUTPUTS = {
    "out": "float[B,S,64] out",
    "present_key": "float[B,2,T,16] present_0_key",
    "present_value": "float[B,2,T,16] present_0_value",
}
HEADS = "num_heads=4, kv_num_heads=2"
ROTARY = {"cos": "float[32,8] cos", "sin": "float[32,8] sin"}
PACKED = {"query": "float[B,S,128] query", "key": None, "value": None}
SUMMED = {"mask": "int64[B,T] attention_mask"}
SUM = """sum = ReduceSum<keepdims=1>(attention_mask, i(1)) less = Sub(sum, i(1)) seqlens_k = Cast<to=6>(less)
    sizes = Shape(attention_mask) size = Gather(sizes, i(1)) total_length = Cast<to=6>(size)"""


def gqa(
    attributes: str = "",
    tail: str = "",
    operands: str = "query, key, value",
    inputs: Mapping[str, str | None] | None = None,
    front: str = "",
    outputs: str = "",
    **more: Any,
) -> onnx.ModelProto:
    """A one-node decoder; `tail` is what follows total_sequence_length, `front` what makes its inputs."""
    node = f"""{front} out, present_0_key, present_0_value{outputs} =
        com.microsoft.GroupQueryAttention<{HEADS}{attributes}>(
        {operands}, past_0_key, past_0_value, seqlens_k, total_length{tail})"""
    return decoder(
        inputs={**INPUTS, **(inputs or {})},
        outputs=OUTPUTS | more.pop("gives", {}),
        domains=', "com.microsoft": 1',
        values=node,
        **GONE,
        **more,
    )


SPELLINGS: dict[str, dict[str, Any]] = {
    "separate": {},
    "packed": {"operands": "query, , ", "inputs": PACKED},
    "scale and softcap": {"attributes": ", scale=0.3, softcap=1.5"},
    "window": {"attributes": ", local_window_size=3"},
    "window of one": {"attributes": ", local_window_size=1"},
    "rotary": {"attributes": ", do_rotary=1", "inputs": ROTARY, "tail": ", cos, sin"},
    "rotary, packed, interleaved": {
        "attributes": ", do_rotary=1, rotary_interleaved=1",
        "inputs": ROTARY | PACKED,
        "operands": "query, , ",
        "tail": ", cos, sin",
    },
    "partial rotary": {
        "attributes": ", do_rotary=1",
        "inputs": {
            "cos": "float[32,8] cos",
            "sin": "float[32,8] sin",
            "query": "float[B,S,128] query",
            "key": "float[B,S,64] key",
            "value": "float[B,S,64] value",
            "past_key": "float[B,2,P,32] past_0_key",
            "past_value": "float[B,2,P,32] past_0_value",
        },
        "gives": {
            "out": "float[B,S,128] out",
            "present_key": "float[B,2,T,32] present_0_key",
            "present_value": "float[B,2,T,32] present_0_value",
        },
        "tail": ", cos, sin",
    },
    "rotary at given positions": {
        "attributes": ", do_rotary=1",
        "inputs": ROTARY | {"at": "int64[B,S] positions"},
        "tail": ", cos, sin, positions",
    },
    "bias": {"inputs": {"bias": "float[1,4,S,T] bias"}, "tail": ", , , , bias", "attributes": ", softcap=1.5"},
    "sink logits": {"inputs": {"sink": "float[4] sink"}, "tail": ", , , , , sink"},
    "smooth softmax": {"attributes": ", smooth_softmax=1"},
    "lengths summed from a mask": {"inputs": SUMMED | {"total": None}, "front": SUM},
    "lengths summed from a mask, window": {
        "inputs": SUMMED | {"total": None},
        "front": SUM,
        "attributes": ", local_window_size=4",
    },
}


@pytest.mark.parametrize(("batch", "steps"), [(2, (5, 1, 1)), (1, (5, 3, 1))])  # the original's chunks have one row
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_give_the_original_s_result(
    name: str, batch: int, steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graphs.BATCH", batch)
    monkeypatch.setattr("graphs.STEPS", steps)
    model = gqa(**SPELLINGS[name])
    report = kivi.inspect(model)
    assert not report.misses
    assert report.sites[0].family == "gqa"
    for expected, got in replay(model, tmp_path):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


@pytest.mark.parametrize("name", ["rotary", "partial rotary", "bias", "sink logits"])
def test_float16(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphs.STEPS", (5, 1, 1))
    spelling = SPELLINGS[name]
    inputs, gives = (
        {key: text and text.replace("float[", "float16[") for key, text in (table | spelling.get(role, {})).items()}
        for role, table in (("inputs", INPUTS), ("gives", OUTPUTS))
    )
    for expected, got in replay(gqa(**(spelling | {"inputs": inputs, "gives": gives})), tmp_path):
        assert got.dtype == np.float16
        assert np.abs(got - expected).max() <= HALF_ROUNDING * np.ptp(expected)


def test_facts_are_read_off_the_node() -> None:
    model = gqa(", local_window_size=3, softcap=1.5", operands="query, , ", inputs=PACKED)
    site = kivi.inspect(model).sites[0]
    assert (site.q_heads, site.kv_heads, site.k_head_size, site.v_head_size) == (4, 2, 16, 16)
    assert (site.scale, site.window, site.softcap, site.is_causal) == (0.25, 3, 1.5, True)


def test_equal_layers_share_what_stands_in_front() -> None:
    """Two rotary nodes over the same lengths: one set of positions, one mask."""
    second = """out2, present_1_key, present_1_value = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2,
        do_rotary=1>(query, key, value, past_1_key, past_1_value, seqlens_k, total_length, cos, sin)"""
    model = gqa(
        ", do_rotary=1",
        tail=f", cos, sin) {second.removesuffix(')')}",
        inputs=ROTARY | {"pk": "float[B,2,P,16] past_1_key", "pv": "float[B,2,P,16] past_1_value"},
        gives={
            "out2": "float[B,S,64] out2",
            "pk": "float[B,2,T,16] present_1_key",
            "pv": "float[B,2,T,16] present_1_value",
        },
    )
    one = kivi.rewrite(gqa(", do_rotary=1", tail=", cos, sin", inputs=ROTARY))[0]
    two = kivi.rewrite(model)[0]
    extra = len(two.graph.node) - len(one.graph.node)
    assert extra == len(("QuantizedKvSdpa", "Transpose", "Reshape"))


def run_ragged(
    model: onnx.ModelProto, folder: Path, masks: list[npt.NDArray[np.int64]], lengths: list[int]
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
    """(original, rewritten, real tokens) per step; masks (2, T) are the model's own, `lengths` the new tokens."""
    path = folder / "model.onnx"
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], path)
    original = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rewritten = kivi.Session(path)
    rng = np.random.default_rng(0)
    tables = {name: rng.standard_normal((32, 8), np.float32) for name in ("cos", "sin")}
    past = {name: np.zeros((2, 2, 0, 16), np.float32) for name in ("past_0_key", "past_0_value")}
    results: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]] = []
    for mask, count in zip(masks, lengths, strict=True):
        sizes = {"query": 64, "key": 32, "value": 32}
        new: dict[str, Any] = {n: rng.standard_normal((2, count, s), np.float32) for n, s in sizes.items()}
        new |= {
            "seqlens_k": (mask.sum(1) - 1).astype(np.int32),
            "total_length": np.array(mask.shape[1], np.int32),
            "attention_mask": mask,
        }
        new |= tables
        given = {i.name: new[i.name] for i in original.get_inputs() if i.name in new}
        names = [o.name for o in original.get_outputs()]
        before = dict(zip(names, original.run(None, given | past), strict=True))
        real = np.arange(count) < mask.sum(1, keepdims=True) if not results else np.ones((2, count), bool)
        results.append((before["out"], rewritten.run(["out"], given)[0], real))
        past = {name: before[name.replace("past", "present")] for name in past}
    return results


IN_PLACE = [np.array([[1] * (5 + n), [1] * 3 + [0] * 2 + [1] * n]) for n in range(3)]
AT_THE_END = [np.array([[1] * (5 + n), [1] * (3 + n) + [0] * 2]) for n in range(3)]
LENGTHS = [5, 1, 1]
FROM_MASK: dict[str, Any] = {
    "attributes": ", do_rotary=1",
    "inputs": SUMMED | ROTARY | {"total": None},
    "front": SUM,
    "tail": ", cos, sin",
}


def test_padding_after_the_prompt_is_not_seen_later(tmp_path: Path) -> None:
    for expected, got, real in run_ragged(gqa(**FROM_MASK), tmp_path, IN_PLACE, LENGTHS):
        assert np.abs(got - expected)[real].max() <= ROUNDING * np.ptp(expected)


@pytest.mark.parametrize(
    ("changes", "masks", "demand"),
    [
        (FROM_MASK, AT_THE_END, "padding_must_follow_the_prompt_and_stay_there"),
        (FROM_MASK | {"attributes": ", do_rotary=1, local_window_size=3"}, IN_PLACE, "rows_must_be_of_one_length"),
        ({}, IN_PLACE, "rows_must_be_of_one_length"),
    ],
    ids=["mask with padding moved to the end", "window", "lengths alone"],
)
def test_rows_that_the_cache_can_t_follow_stop_the_run_after_the_prompt(
    changes: dict[str, Any], masks: list[npt.NDArray[np.int64]], demand: str, tmp_path: Path
) -> None:
    ((expected, got, real),) = run_ragged(gqa(**changes), tmp_path, masks[:1], LENGTHS[:1])
    assert np.abs(got - expected)[real].max() <= ROUNDING * np.ptp(expected)
    with pytest.raises(Exception, match=demand):  # onnxruntime has a class of its own for each status
        run_ragged(gqa(**changes), tmp_path, masks[:2], LENGTHS[:2])


def test_padding_in_front_stops_the_run(tmp_path: Path) -> None:
    """The original takes it for tokens."""
    with pytest.raises(Exception, match="padding_must_follow_the_prompt"):
        run_ragged(gqa(**FROM_MASK), tmp_path, [np.array([[1] * 5, [0] * 2 + [1] * 3])], [5])


def test_tokens_beyond_the_rotary_table_stop_the_run(tmp_path: Path) -> None:
    model = gqa(**SPELLINGS["rotary"])
    kivi.save(kivi.rewrite(model)[0], tmp_path / "model.onnx")
    session, rng = kivi.Session(tmp_path / "model.onnx"), np.random.default_rng(0)
    assert np.isfinite(session.run(["out"], feeds(rng, 0, 32, model))[0]).all()
    session.cache.reset()
    with pytest.raises(Exception, match="positions_must_lie_within_the_rotary_table"):
        session.run(["out"], feeds(rng, 0, 33, model))


def test_a_window_sized_buffer_is_replaced_by_the_whole_cache_and_a_window(tmp_path: Path) -> None:
    """The original keeps 4 tokens in a buffer of 6 from the start; ours grows and sees the same ones."""
    model = gqa(", local_window_size=4, sliding_window_cache=1")
    assert kivi.inspect(model).sites[0].capacity == 4
    path = tmp_path / "model.onnx"
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], path)
    original = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    rewritten = kivi.Session(path)
    rng = np.random.default_rng(0)
    past = {name: np.zeros((1, 2, 6, 16), np.float32) for name in ("past_0_key", "past_0_value")}
    total = 0
    for count in (5, 3, 1, 1):
        total += count
        given = {
            **{
                n: rng.standard_normal((1, count, s), np.float32)
                for n, s in (("query", 64), ("key", 32), ("value", 32))
            },
            "seqlens_k": np.array([total - 1], np.int32),
            "total_length": np.array(total, np.int32),
        }
        expected, *present = original.run(None, given | past)
        past = dict(zip(past, present, strict=True))
        got = rewritten.run(["out"], given)[0]
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_the_size_of_a_window_sized_buffer_is_no_past_length() -> None:
    """What reads it gets the buffer's size in the original, which nothing knows once the buffer is gone."""
    sized: dict[str, Any] = {"front": "sizes = Shape(past_0_key)", "gives": {"sizes": "int64[4] sizes"}}
    report = kivi.inspect(gqa(", local_window_size=4, sliding_window_cache=1", **sized))
    assert any("is known from the cache only" in miss.reason for miss in report.misses), report
    assert not kivi.inspect(gqa(", local_window_size=4", **sized)).misses


def test_verify_gives_a_window_sized_buffer_its_room(tmp_path: Path) -> None:
    model = gqa(
        ", local_window_size=4, sliding_window_cache=1",
        operands="query, , ",
        inputs={
            **PACKED,
            **SUMMED,
            "query": "int64[B,S] input_ids",
            "total": None,
            "past_key": "float[B,2,C,16] past_0_key",
            "past_value": "float[B,2,C,16] past_0_value",
        },
        front=f"{SUM} query = Gather(table, input_ids)",
    )
    table = np.random.default_rng(0).standard_normal((100, 128), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    onnx.save(model, tmp_path / "original.onnx")
    config = kivi.KiviConfig(8, 8, block_tokens=8, residual_length=0, sink_length=0)
    kivi.save(kivi.rewrite(model, config)[0], tmp_path / "model.onnx")
    result = kivi.verify(tmp_path / "original.onnx", tmp_path / "model.onnx")
    assert result.ok, result
    assert result.sealed_tokens > 0


QUANTIZED = {"past_key": "int8[B,2,P,16] past_0_key", "past_value": "int8[B,2,P,16] past_0_value"}
NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "not causal": ({"attributes": ", causal=0"}, "causal=0"),
    "a window of no token": ({"attributes": ", local_window_size=0"}, "local_window_size: expected -1 or at least 1"),
    "a flag that is neither 0 nor 1": (
        {"attributes": ", do_rotary=-1", "inputs": ROTARY, "tail": ", cos, sin"},
        "do_rotary': expected 0 or 1, got -1",
    ),
    "its own quantized cache": (
        {
            "inputs": QUANTIZED | {"ks": "float[1] ks", "vs": "float[1] vs"},
            "gives": {"present_key": "int8[B,2,T,16] present_0_key", "present_value": "int8[B,2,T,16] present_0_value"},
            "tail": ", , , , , , ks, vs",
            "attributes": ', k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR", kv_cache_bit_width=8',
        },
        "quantized or of another type",
    ),
    "norm inside": (
        {"inputs": {"n": "float[16] n"}, "tail": ", , , , , , , , n, n"},
        "a norm of the queries",
    ),
    "padded chunks": (
        {"inputs": {"n": "int32[B] n"}, "tail": ", , , , , , , , , , n"},
        "the lengths of a padded chunk",
    ),
    "scores as an output": (
        {"outputs": ", more", "attributes": ", qk_output=1", "gives": {"more": "float[B,4,S,T] more"}},
        "the scores, is read",
    ),
    "rotary with tables of unknown size": (
        {
            "attributes": ", do_rotary=1",
            "inputs": {"cos": "float[M,D] cos", "sin": "float[M,D] sin"},
            "tail": ", cos, sin",
        },
        "do_rotary: the sizes",
    ),
    "keys of one layer, values of another": (
        {
            "inputs": {"past_value": "float[B,2,P,16] past_1_value"},
            "front": "past_0_value = Identity(past_1_value)",
        },
        "caches of different layers",
    ),
    "present read by something else": (
        {"guard": "", "gives": {"more": "float more"}, "tail": ") more = ReduceSum<keepdims=0>(present_0_key"},
        "is also read by ReduceSum",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    report = kivi.inspect(gqa(**changes))
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report
