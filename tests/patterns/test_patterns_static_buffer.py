"""The family `static_buffer`: buffers read whole under a mask give way to a cache; other uses are refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnx_kivi as kivi
from graphs import STEPS, decoder, feeds, replay

ROUNDING = 2e-6  # sums of at most 16 float32 products of order 1, taken in another order
TOKENS = 16


def places(size: int) -> str:
    """The constant 0, 1, ... size - 1."""
    return f"i({','.join(map(str, range(size)))})"


PLACES = places(TOKENS)
INPUTS = {
    "mask": None,
    "past_key": f"float[B,2,{TOKENS},8] past_0_key",
    "past_value": f"float[B,2,{TOKENS},8] past_0_value",
    "write_places": "int64[S] write_places",
}
OUTPUTS = {
    "present_key": f"float[B,2,{TOKENS},8] present_0_key",
    "present_value": f"float[B,2,{TOKENS},8] present_0_value",
}
SEEN = f"column = Unsqueeze(write_places, i(1)) seen = LessOrEqual({PLACES}, column)"
GONE = dict.fromkeys(("repeat_key", "repeat_value", "transpose", "product", "scale", "mask", "softmax"))


def elements(side: str, attributes: str = "axis=2", index: str = "i(0,1,3)") -> str:
    """As torch's TorchScript exporter writes index_copy."""
    return f"""at_{side} = Unsqueeze(write_places, {index}) like_{side} = Shape({side})
        index_{side} = Expand(at_{side}, like_{side})
        present_0_{side} = ScatterElements<{attributes}>(past_0_{side}, index_{side}, {side})"""


def in_front(side: str, attributes: str = "") -> str:
    """As torch's dynamo exporter writes index_copy: the tokens' axis in front."""
    return f"""at_{side} = Unsqueeze(write_places, i(-1)) old_{side} = Transpose<perm=[2,0,1,3]>(past_0_{side})
        new_{side} = Transpose<perm=[2,0,1,3]>({side})
        all_{side} = ScatterND{attributes}(old_{side}, at_{side}, new_{side})
        present_0_{side} = Transpose<perm=[1,2,0,3]>(all_{side})"""


def grid(side: str) -> str:
    """As torch's TorchScript exporter writes index_put: an index for each axis up to the tokens'."""
    return f"""shape_{side} = Shape({side})
        rows_{side} = Gather(shape_{side}, zero) heads_{side} = Gather(shape_{side}, one)
        r1_{side} = Range(zero, rows_{side}, one) h1_{side} = Range(zero, heads_{side}, one)
        r_{side} = Reshape(r1_{side}, i(-1,1,1)) h_{side} = Reshape(h1_{side}, i(-1,1))
        rh_{side} = Add(r_{side}, h_{side}) rhs_{side} = Add(rh_{side}, write_places) grid_{side} = Shape(rhs_{side})
        r3_{side} = Expand(r_{side}, grid_{side}) h3_{side} = Expand(h_{side}, grid_{side})
        p3_{side} = Expand(write_places, grid_{side})
        r4_{side} = Unsqueeze(r3_{side}, i(-1)) h4_{side} = Unsqueeze(h3_{side}, i(-1))
        p4_{side} = Unsqueeze(p3_{side}, i(-1)) at_{side} = Concat<axis=-1>(r4_{side}, h4_{side}, p4_{side})
        present_0_{side} = ScatterND(past_0_{side}, at_{side}, {side})"""


SCALARS = "z = Squeeze(i(0)) zero = Identity(z) o = Squeeze(i(1)) one = Identity(o) "


def static(
    inputs: dict[str, str | None] | None = None,
    outputs: dict[str, str | None] | None = None,
    **lines: Any,
) -> onnx.ModelProto:
    """The template over two buffers of 16 tokens, read under the mask that `write_places` tell."""
    defaults: dict[str, Any] = {
        "join_key": elements("key"),
        "join_value": elements("value"),
        "mask": f"{SEEN} fill = Where(seen, f(0), f(-3e38)) masked = Add(scaled, fill)",
    }
    return decoder(inputs=INPUTS | (inputs or {}), outputs=OUTPUTS | (outputs or {}), **(defaults | lines))


SPELLINGS: dict[str, dict[str, Any]] = {
    "ScatterElements": {},
    "ScatterND, tokens in front": {"join_key": in_front("key"), "join_value": in_front("value")},
    "ScatterND, a grid of indices": {"join_key": SCALARS + grid("key"), "join_value": grid("value")},
    "one of each": {"join_value": in_front("value")},
    "an expanded index of 32 bits": {
        "join_key": elements("key")
        .replace("Unsqueeze(write_places,", "Unsqueeze(short,")
        .replace("at_key", "short = Cast<to=6>(write_places) at_key", 1)
    },
    "the mask by Where": {"mask": f"{SEEN} masked = Where(seen, scaled, f(-1e9))"},
    "a bias beside the mask": {
        "inputs": {"bias": f"float[1,4,1,{TOKENS}] bias"},
        "mask": f"{SEEN} biased = Add(scaled, bias) masked = Where(seen, biased, f(-1e9))",
    },
    "a bias that is added after the mask": {
        "inputs": {"bias": f"float[1,4,1,{TOKENS}] bias"},
        "mask": f"{SEEN} hidden = Where(seen, scaled, f(-1e9)) masked = Add(hidden, bias)",
    },
    "a mask before the scale": {
        "scale": f"{SEEN} fill = Where(seen, f(0), f(-3e38)) hidden = Add(scores, fill) scaled = Mul(hidden, f(0.3))",
        "mask": "masked = Identity(scaled)",
    },
    "opset 11": {
        "opset": 11,
        "join_key": elements("key").replace(
            "Unsqueeze(write_places, i(0,1,3))", "Unsqueeze<axes=[0,1,3]>(write_places)"
        ),
        "join_value": elements("value").replace(
            "Unsqueeze(write_places, i(0,1,3))", "Unsqueeze<axes=[0,1,3]>(write_places)"
        ),
        "repeat_key": """k5 = Unsqueeze<axes=[2]>(present_0_key) k6 = Expand(k5, i(1,1,2,1,1))
            k = Reshape(k6, i(0,4,-1,8))""",
        "repeat_value": """v5 = Unsqueeze<axes=[2]>(present_0_value) v6 = Expand(v5, i(1,1,2,1,1))
            v = Reshape(v6, i(0,4,-1,8))""",
        "mask": f"""column = Unsqueeze<axes=[1]>(write_places) over = Less(column, {PLACES})
            masked = Where(over, f(-1e9), scaled)""",
    },
    "TensorScatter": {
        "opset": 24,
        "inputs": {"written": "int64[B] written"},
        "join_key": "present_0_key = TensorScatter<axis=2>(past_0_key, key, written)",
        "join_value": "present_0_value = TensorScatter(past_0_value, value, written)",
    },
    "ai.onnx Attention": {
        **GONE,
        "opset": 23,
        "mask": f"{SEEN} shown = Unsqueeze(seen, i(0,1))",
        "values": "out = Attention<scale=0.3>(query, present_0_key, present_0_value, shown)",
    },
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_give_the_original_s_result(name: str, tmp_path: Path) -> None:
    model = static(**SPELLINGS[name])
    report = kivi.inspect(model)
    assert not report.misses
    assert report.sites[0].family == "static_buffer"
    for expected, got in replay(model, tmp_path):
        assert got.shape == expected.shape
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


def test_a_buffer_that_is_full_in_the_end_gives_the_original_s_result(tmp_path: Path) -> None:
    size = sum(STEPS)
    sides = ("key", "value")
    model = static(
        inputs={f"past_{side}": f"float[B,2,{size},8] past_0_{side}" for side in sides},
        outputs={f"present_{side}": f"float[B,2,{size},8] present_0_{side}" for side in sides},
        mask=f"{SEEN.replace(PLACES, places(size))} masked = Where(seen, scaled, f(-1e9))",
    )
    for expected, got in replay(model, tmp_path):
        assert np.abs(got - expected).max() <= ROUNDING * np.ptp(expected)


WRITTEN, HIDDEN = "tokens_must_be_written_where_the_cache_ends", "mask_must_hide_what_is_not_written"
GIVEN: dict[str, Any] = {"inputs": {"shown": f"float[B,1,S,{TOKENS}] shown"}, "mask": "masked = Add(scaled, shown)"}
HIDING = np.where(np.arange(TOKENS) <= np.arange(5)[:, None], 0, -3e38).astype(np.float32)[None, None].repeat(2, 0)


@pytest.mark.parametrize("join", [elements, in_front])
@pytest.mark.parametrize(
    ("change", "demand"),
    [
        ({"write_places": np.arange(1, 6)}, WRITTEN),
        ({"write_places": np.array([1, 0, 2, 3, 4])}, WRITTEN),
        ({"shown": np.zeros_like(HIDING)}, HIDDEN),
        ({"shown": np.maximum(HIDING, -100)}, HIDDEN),
        ({"shown": np.where(np.arange(TOKENS) == TOKENS - 1, 0, HIDING).astype(np.float32)}, HIDDEN),
    ],
    ids=["one place on", "in another order", "nothing hidden", "hidden by too little", "the last place shown"],
)
def test_runs_that_the_cache_can_t_follow_stop(join: Any, change: dict[str, Any], demand: str, tmp_path: Path) -> None:
    model = static(join_key=join("key"), join_value=join("value"), **GIVEN)
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], tmp_path / "model.onnx")
    session = kivi.Session(tmp_path / "model.onnx")
    new = feeds(np.random.default_rng(0), 0, 5, model) | {"shown": HIDING}
    with pytest.raises(Exception, match=demand):  # onnxruntime has a class of its own for each status
        session.run(["out"], new | change)
    assert np.isfinite(session.run(["out"], new)[0]).all()


def test_a_mask_that_the_scale_weakens_stops(tmp_path: Path) -> None:
    model = static(
        inputs=GIVEN["inputs"],
        scale="hidden = Add(scores, shown) scaled = Mul(hidden, f(0.3))",
        mask="masked = Identity(scaled)",
    )
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], tmp_path / "model.onnx")
    session = kivi.Session(tmp_path / "model.onnx")
    new = feeds(np.random.default_rng(0), 0, 5, model)
    with pytest.raises(Exception, match=HIDDEN):
        session.run(["out"], new | {"shown": np.maximum(HIDING, -1e9)})
    assert np.isfinite(session.run(["out"], new | {"shown": np.maximum(HIDING, -4e9)})[0]).all()


def test_an_index_is_checked_before_it_is_repeated() -> None:
    rewritten = kivi.rewrite(static())[0]
    assert {"Expand", "ScatterElements"}.isdisjoint(node.op_type for node in rewritten.graph.node)


def test_a_grid_that_writes_heads_elsewhere_stops(tmp_path: Path) -> None:
    turned = grid("key").replace("h_key = Reshape(h1_key", "h0_key = Sub(one, h1_key) h_key = Reshape(h0_key")
    model = static(join_key=SCALARS + turned, join_value=grid("value"))
    kivi.save(kivi.rewrite(model, kivi.KiviConfig(32, 32))[0], tmp_path / "model.onnx")
    with pytest.raises(Exception, match=WRITTEN):
        kivi.Session(tmp_path / "model.onnx").run(["out"], feeds(np.random.default_rng(0), 0, 5, model))


def test_what_is_scattered_but_not_returned_is_no_cache() -> None:
    model = decoder(
        inputs={"embeds": "float[B,S,8] embeds", "images": "float[N,8] images", "where": "int64[N,2] where"},
        outputs={"more": "float[B,S,8] more"},
        guard="merged = ScatterND(embeds, where, images) more = Relu(merged)",
    )
    report = kivi.inspect(model)
    assert len(report.sites) == 1
    assert not report.misses


GROWING: dict[str, Any] = {
    side: {
        "inputs": {f"past_{side}": f"float[B,2,P,8] past_0_{side}"},
        "outputs": {f"present_{side}": f"float[B,2,T,8] present_0_{side}"},
        f"join_{side}": f"present_0_{side} = Concat<axis=2>(past_0_{side}, {side})",
    }
    for side in ("key", "value")
}
NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"mask": "masked = Identity(scaled)"}, "buffer of fixed size 'past_0_key': .* no mask tells"),
    "a mask that is one number": ({"mask": "masked = Add(scaled, f(-1))"}, "expected the tokens on its last axis"),
    "values that grow": (GROWING["value"], "values and keys come from"),
    "keys that grow": (GROWING["key"], "values and keys come from"),
    "added to what was there": ({"join_key": elements("key", 'axis=2, reduction="add"')}, "reduction 'add'"),
    "added by ScatterND": ({"join_value": in_front("value", '<reduction="add">')}, "reduction 'add'"),
    "some heads only": (
        {"inputs": {"value": "float[B,1,S,8] value"}},
        "ScatterElements 'present_0_value': 1 of 2 places of axis 1",
    ),
    "part of each head": ({"inputs": {"value": "float[B,2,S,4] value"}}, "4 of 8 places of axis 3"),
    "written along another axis": ({"join_key": elements("key", "axis=3")}, "written along axis 3"),
    "rows of the batch written": (
        {"join_key": "at = Unsqueeze(write_places, i(-1)) present_0_key = ScatterND(past_0_key, at, key)"},
        "expected an index for each axis up to that of the tokens",
    ),
    "a buffer of no declared size": (
        {
            "inputs": {f"past_{side}": f"float[B,2,L,8] past_0_{side}" for side in ("key", "value")},
            "outputs": {f"present_{side}": f"float[B,2,L,8] present_0_{side}" for side in ("key", "value")},
            "mask": """sizes = Shape(past_0_key) length = Gather(sizes, i(2)) limit = Squeeze(length)
                places = Range(zero, limit, one) column = Unsqueeze(write_places, i(1))
                seen = LessOrEqual(places, column) masked = Where(seen, scaled, f(-1e9))""",
            "scale": f"{SCALARS} scaled = Mul(scores, f(0.3))",
        },
        "its number of tokens is not declared",
    ),
    "is_causal, which counts from 0": (
        {
            **GONE,
            "opset": 23,
            "mask": f"{SEEN} shown = Unsqueeze(seen, i(0,1))",
            "values": "out = Attention<is_causal=1>(query, present_0_key, present_0_value, shown)",
        },
        "counts positions from 0",
    ),
    "circular": (
        {
            "opset": 24,
            "inputs": {"written": "int64[B] written"},
            "join_key": 'present_0_key = TensorScatter<axis=2, mode="circular">(past_0_key, key, written)',
        },
        "expected a linear buffer",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_say_why(name: str) -> None:
    changes, reason = NEAR_MISSES[name]
    report = kivi.inspect(static(**changes))
    assert not report.sites
    assert any(re.search(reason, miss.reason) for miss in report.misses), report
