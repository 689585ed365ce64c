"""Rewrites with ghost I/O: hosts that carry a past run them as they ran the original, and our sessions as any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
from onnx_kivi.measure.verify import verify
from onnx_kivi.run.session import open_model, quiet_options
from onnx_kivi.run.stepper import Stepper
from onnx_kivi.spec import CONTROL_INPUTS
from zoo import MODELS

SMALL: dict[str, Any] = {"block_tokens": 16, "residual_length": 8, "sink_length": 2}
PROMPT = np.arange(3, 43)[None].repeat(2, 0)
# As many steps on, in float32 and in another order, logits of size ten have moved by this much at most.
ROUNDING = 2e-4


def ghost(model: Path, to: Path, bits: int = 32) -> Path:
    config = kivi.KiviConfig(bits, bits, io="ghost", **SMALL)
    kivi.save(kivi.rewrite(model, config)[0], to)
    return to


def carrying(path: Path) -> ort.InferenceSession:
    """A plain session, which knows the library and nothing of caches."""
    pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)
    options = quiet_options()
    options.register_custom_ops_library(kivi.library_path())
    return open_model(path, options)


class Narrow(Stepper):
    """Carries what it is given, from an empty past of one head and four channels on."""

    def _start(self, batch: int) -> dict[str, Any]:
        return dict.fromkeys(self._signature.present, np.zeros((batch, 1, 0, 4), np.float32))


@pytest.mark.parametrize("name", ["optimum/llama", "genai-fp32/llama", "dynamo-18/gpt2", "legacy-17/xglm"])
def test_a_host_that_carries_a_past_gets_the_originals_logits(name: str, tmp_path: Path) -> None:
    original = Stepper(open_model(MODELS[name]), facts=kivi.inspect(MODELS[name]).cache_facts)
    rewritten = Narrow(carrying(ghost(MODELS[name], tmp_path / "model.onnx")))
    mask = np.ones((2, 60), np.int64)
    mask[1, :5] = "genai" in name  # whose padding follows the prompt
    chunk = 41 if "genai" in name else 47  # the original takes one token at a time behind a past of two rows
    for start, end in ((0, 40), (40, chunk), (chunk, chunk + 1)):
        ids = np.resize(PROMPT, (2, end - start))
        expected, got = (each.step(ids, mask[:, :end]) for each in (original, rewritten))
        np.testing.assert_allclose(
            got[mask[:, start:end] == 1], expected[mask[:, start:end] == 1], rtol=0, atol=ROUNDING
        )


def test_past_and_present_of_the_first_layer_stay_and_hosts_must_feed_them(tiny: Path, tmp_path: Path) -> None:
    session = open_model(tiny)
    rewritten = carrying(ghost(tiny, tmp_path / "model.onnx"))
    kept = {i.name: i for i in rewritten.get_inputs()}
    assert {i.name for i in session.get_inputs() if "past" not in i.name} < kept.keys()
    assert [name for name in kept if "past" in name] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert [o.name for o in rewritten.get_outputs()] == ["logits", "present.0.key", "present.0.value"]
    assert {i.name for i in rewritten.get_overridable_initializers()} == CONTROL_INPUTS.keys()
    for name in ("past_key_values.0.key", "past_key_values.0.value"):
        assert kept[name].type == "tensor(float)"
        assert not any(isinstance(size, int) for size in kept[name].shape)


def test_our_sessions_run_it_as_any_other(
    tiny: Path, tmp_path: Path, open_session: Callable[[Path], kivi.Session]
) -> None:
    path, plain = ghost(tiny, tmp_path / "model.onnx", 8), tmp_path / "plain.onnx"
    kivi.save(kivi.rewrite(tiny, kivi.KiviConfig(**SMALL))[0], plain)
    session, other = open_session(path), open_session(plain)
    assert [o.name for o in session.get_outputs()] == ["logits"]
    assert [i.name for i in session.get_inputs()] == [i.name for i in other.get_inputs()]
    tokens = [[*s.generate(PROMPT[0], max_new_tokens=20)] for s in (session, other)]
    assert tokens[0] == tokens[1]
    checked = verify(tiny, path)
    assert checked.ok
    assert checked.sealed_tokens > 0


def test_quantized_stamps_give_the_tokens_of_our_own_session(tiny: Path, tmp_path: Path) -> None:
    path = ghost(tiny, tmp_path / "model.onnx", 8)
    session = kivi.Session(path, host="native")
    cache = session.new_cache()
    own, carried = Stepper(session, cache), Narrow(carrying(path))
    ids = PROMPT
    for _ in range(12):
        expected, got = own.step(ids), carried.step(ids)
        np.testing.assert_array_equal(got, expected)
        ids = expected[:, -1:].argmax(-1)
    assert cache.sealed_tokens > 0


def test_nothing_else_of_the_graph_differs(tiny: Path, tmp_path: Path) -> None:
    ghostly = onnx.load(ghost(tiny, tmp_path / "model.onnx"))
    plain, _ = kivi.rewrite(tiny, kivi.KiviConfig(32, 32, **SMALL))
    ops = [node.op_type for node in plain.graph.node]
    extra = [node.op_type for node in ghostly.graph.node if node.op_type in {"CacheOpen", "CacheStamp"}]
    assert sorted(node.op_type for node in ghostly.graph.node) == sorted([*ops, *extra, "Shape", "Shape"])
    assert extra == ["CacheOpen", "CacheStamp"]
    assert kivi.rewrite(tiny, kivi.KiviConfig(io="ghost"))[0] == kivi.rewrite(tiny, kivi.KiviConfig(io="ghost"))[0]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("optimum/t5/decoder_with_past_model", r"no inputs input_ids and attention_mask \(batch, tokens\)"),
        ("dynamo-18-static/llama", "its first cache is no pair of keys and values .* that grows"),
    ],
)
def test_a_model_that_can_not_have_it_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(kivi.UnsupportedModelError, match=f"ghost I/O: .*{reason}.*; rewrite with --io none"):
        kivi.rewrite(MODELS[name], kivi.KiviConfig(io="ghost"))
    report = kivi.inspect(MODELS[name])
    assert not report.to_dict()["ghost"]
    assert "ghost I/O, for hosts that carry a past: no, " in str(report)


def test_inspect_tells_of_a_rewritten_file_which_kind_it_is(tiny: Path, tmp_path: Path) -> None:
    assert "ghost I/O, for hosts that carry a past: yes" in str(kivi.inspect(tiny))
    with pytest.raises(kivi.UnsupportedModelError, match="already rewritten, with --io ghost; start from the original"):
        kivi.inspect(ghost(tiny, tmp_path / "model.onnx"))


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(kivi.ConfigError, match="io: expected one of none, ghost, got 'spectral'"):
        kivi.KiviConfig(io="spectral")
    with pytest.raises(kivi.ConfigError, match="kv_bytes: expected 0 without ghost I/O"):
        kivi.KiviConfig(kv_bytes=5)
