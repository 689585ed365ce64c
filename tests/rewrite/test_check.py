"""The postcondition of a rewrite: a broken emitter is caught, the node is named, and nothing is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import onnx_kivi as kivi
from graphs import decoder, two_layers
from onnx_kivi.cli.parser import main
from onnx_kivi.graph import Builder, Changes, Graph, Model, apply
from onnx_kivi.rewrite import emit, emit_site
from onnx_kivi.rewrite.check import check
from onnx_kivi.spec import SdpaAttributes

REPORT = "an error of onnx_kivi, not of the model; nothing was written; report it"


def rewritten() -> onnx.ModelProto:
    return kivi.rewrite(two_layers(-1))[0]


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    found: list[onnx.NodeProto] = [n for n in model.graph.node if name in n.name]
    return found[0]


def set_int(model: onnx.ModelProto, name: str, attribute: str, value: int) -> None:
    next(a for a in node(model, name).attribute if a.name == attribute).i = value


def test_a_sound_rewrite_passes() -> None:
    check(rewritten(), {"past_0_key", "present_0_key"})


BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], Any], str]] = {
    "a removed tensor is read": (
        lambda m: m.graph.node.add(op_type="Relu", name="late", input=["past_0_key"], output=["more"]),
        "Relu 'late'.*'past_0_key'",
    ),
    "a removed input stays": (
        lambda m: m.graph.input.append(onnx.helper.make_tensor_value_info("past_0_key", 1, [1])),
        "'past_0_key': expected no removed tensor",
    ),
    "a slot is given twice": (
        lambda m: set_int(m, "sdpa.1", "slot", 0),
        "QuantizedKvSdpa 'onnx_kivi/sdpa.1/QuantizedKvSdpa': expected slot 1, the next that no node has, got 0",
    ),
    "a slot is left out": (lambda m: set_int(m, "sdpa.1", "slot", 2), "sdpa.1.*expected slot 1.*got 2"),
    "layers are miscounted": (
        lambda m: set_int(m, "KvCacheStep", "layers", 3),
        "KvCacheStepV2 'onnx_kivi/past_length/KvCacheStepV2': expected layers=2, .*got 3",
    ),
    "a node has another ticket": (
        lambda m: node(m, "sdpa.0").input.__setitem__(5, "past_length"),
        "sdpa.0.*expected the ticket 'onnx_kivi/step', got 'past_length'",
    ),
    "no node opens the step": (
        lambda m: setattr(node(m, "KvCacheStep"), "op_type", "Other"),
        "no node: expected one onnx_kivi.KvCacheStep",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_with_the_node_s_name(name: str) -> None:
    break_it, message = BROKEN[name]
    model = rewritten()
    break_it(model)
    with pytest.raises(kivi.UnsupportedModelError, match=f"{message}.*{REPORT}"):
        check(model, {"past_0_key"})


def keep_a_covered_node(changes: Changes, graph: Graph, model: Model) -> None:
    """Take away a node, but not the one that reads it, as if the plan had forgotten that."""
    scores = next(n.index for n in graph.nodes if n.outputs == ("scores_1",))
    reader = onnx.helper.make_node("Relu", ["scores_1"], ["more"], name="forgotten")
    apply(dataclasses.replace(changes, removed_nodes={*changes.removed_nodes, scores}), graph, model)
    model.graph.node.append(reader)


def one_slot_for_all(emitter: Any, site: Any, slot: int) -> SdpaAttributes:
    return dataclasses.replace(attributes(emitter, site, slot), slot=0)


attributes = emit_site.SiteEmitter._attributes


class Miscounting(Builder):
    """A builder that counts no layer."""

    def nodes(self, op: str, /, *inputs: str, **more: Any) -> tuple[str, ...]:
        return super().nodes(op, *inputs, **more | ({"layers": 1} if "layers" in more else {}))


EMITTERS = {
    "a forgotten reader": ((emit, "apply", keep_a_covered_node), "Relu 'forgotten'.*'scores_1'"),
    "one slot for all": ((emit_site.SiteEmitter, "_attributes", one_slot_for_all), "expected slot 1"),
    "layers not counted": ((emit, "Builder", Miscounting), "expected layers=2"),
}


@pytest.mark.parametrize("name", EMITTERS)
def test_a_broken_emitter_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch, message = EMITTERS[name]
    monkeypatch.setattr(*patch)
    with pytest.raises(kivi.UnsupportedModelError, match=f"{message}.*{REPORT}"):
        kivi.rewrite(two_layers(-1))
    source, target = tmp_path / "model.onnx", tmp_path / "small.onnx"
    onnx.save(two_layers(-1), source)
    assert main(["rewrite", str(source), "-o", str(target), "--no-verify"]) == 2
    assert REPORT in capsys.readouterr().err
    assert not target.exists()


def test_a_model_that_was_given_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emit_site.SiteEmitter, "_attributes", lambda *_: SdpaAttributes(slot=1))
    model = decoder()
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(kivi.UnsupportedModelError, match="expected slot 0"):
        kivi.rewrite(model)
    assert model.SerializeToString(deterministic=True) == before
