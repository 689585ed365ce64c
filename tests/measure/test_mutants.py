"""No level of verify passes an error of the graph, nor refuses a sound rewrite, whatever the model rounds itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper, numpy_helper

import onnx_kivi as kivi
from int8_models import KINDS
from onnx_kivi.measure.plans import LEVELS, QUICK
from onnx_kivi_models.tiny import tiny_config, tiny_decoder

WINDOW = 20
QUERY, KEY, VALUE, MASK, SINK = range(5)
SMALL: dict[str, Any] = {"block_tokens": 16, "residual_length": 8, "sink_length": 2}
Array = npt.NDArray[Any]
Edit = Callable[[onnx.ModelProto], None]


def nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type.startswith("QuantizedKvSdpa")]


def set_attribute(name: str, change: Callable[[float], float], layers: slice = slice(None)) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        for node in nodes(model)[layers]:
            (attribute,) = (a for a in node.attribute if a.name == name)
            if attribute.type == onnx.AttributeProto.INT:
                attribute.i = int(change(attribute.i))
            else:
                attribute.s = repr(change(float(attribute.s))).encode()

    return edit


def before(model: onnx.ModelProto, node: onnx.NodeProto, i: int, op: str, *more: Array, **attributes: Any) -> None:
    """Put a node in front of an input of another."""
    added = [f"mutant/{node.name}/{i}/{n}" for n in range(len(more))]
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for a, name in zip(more, added, strict=True))
    out = f"mutant/{node.name}/{i}"
    at = list(model.graph.node).index(node)
    model.graph.node.insert(at, helper.make_node(op, [node.input[i], *added], [out], **attributes))
    node.input[i] = out


def heads(i: int, order: list[int]) -> Edit:
    """The heads of an input in another order, in one layer."""

    def edit(model: onnx.ModelProto) -> None:
        before(model, nodes(model)[-1], i, "Gather", np.array(order), axis=1)

    return edit


def taking_turns(model: onnx.ModelProto) -> None:
    """Query head h reads kv head h % kv heads."""
    node = nodes(model)[0]
    before(model, node, QUERY, "Gather", np.array([0, 2, 1, 3]), axis=1)
    (reader,) = (n for n in model.graph.node if node.output[0] in n.input)
    before(model, reader, list(reader.input).index(node.output[0]), "Gather", np.array([0, 2, 1, 3]), axis=1)


def another_layers(i: int) -> Edit:
    def edit(model: onnx.ModelProto) -> None:
        first, second = nodes(model)
        second.input[i] = first.input[i]

    return edit


def same_tensor(model: onnx.ModelProto) -> None:
    """Values are taken for keys."""
    node = nodes(model)[1]
    node.input[KEY] = node.input[VALUE]


def shifted_mask(model: onnx.ModelProto) -> None:
    """The padding mask, one key late."""
    for node in nodes(model):
        before(model, node, MASK, "Pad", np.array([0, 0, 0, 1, 0, 0, 0, -1]))


def no_mask(model: onnx.ModelProto) -> None:
    for node in nodes(model):
        node.input[MASK] = node.input[SINK]


def no_window(model: onnx.ModelProto) -> None:
    for name in ("window", "evict"):
        set_attribute(name, lambda _: 0)(model)


DEFAULT = {("float32", QUICK), ("int4", QUICK)}
CASES = [
    pytest.param(kind, level, marks=() if (kind, level) in DEFAULT else pytest.mark.slow)
    for kind in KINDS
    for level in LEVELS
]
MUTANTS: dict[str, Edit] = {
    "scale of one layer 2% off": set_attribute("scale", lambda x: x * 1.02, slice(1)),
    "scale forgotten": set_attribute("scale", lambda _: 1.0),
    "softcap dropped": set_attribute("softcap", lambda _: 0.0),
    "softcap 10% off": set_attribute("softcap", lambda x: x * 1.1, slice(1, 2)),
    "window dropped": no_window,
    "window off by one": set_attribute("window", lambda x: x + 1, slice(1)),
    "causal mask dropped": set_attribute("is_causal", lambda _: 0),
    "padding mask one key late": shifted_mask,
    "padding mask dropped": no_mask,
    "query heads swapped": heads(QUERY, [1, 0, 2, 3]),
    "key heads swapped": heads(KEY, [1, 0]),
    "value heads swapped": heads(VALUE, [1, 0]),
    "kv heads repeated in turns": taking_turns,
    "another layer's keys": another_layers(KEY),
    "another layer's values": another_layers(VALUE),
    "another layer's queries": another_layers(QUERY),
    "values for keys": same_tensor,
}


@functools.cache
def rewritten(kind: str, folder: Path, window: int) -> tuple[Path, onnx.ModelProto]:
    """The original, with a softcap, and its rewrite at 8 bits."""
    (folder := folder / str(window)).mkdir()
    config = tiny_config(window=window, softcap=2.0)
    original = KINDS[kind](tiny_decoder(config, sharpness=1.4), folder)
    return original, kivi.rewrite(original, kivi.KiviConfig(**SMALL))[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}


def verified(kind: str, folder: Path, level: str, edit: Edit | None = None, window: int = WINDOW) -> kivi.Verification:
    original, sound = rewritten(kind, folder, window)
    model = onnx.ModelProto()
    model.CopyFrom(sound)
    if edit:
        edit(model)
    onnx.save(model, folder / "rewritten.onnx")
    return kivi.verify(original, folder / "rewritten.onnx", level=level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_rewrite_passes(kind: str, level: str, folders: dict[str, Path]) -> None:
    checked = verified(kind, folders[kind], level)
    assert checked.ok, checked.reason
    assert checked.sealed_tokens > 0
    assert checked.max_rel_diff < 1e-5
    assert (checked.own_kl is not None) == (checked.as_is_kl is not None) == (kind != "float32")


@pytest.mark.parametrize(("kind", "level"), CASES)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_an_error_of_the_graph_fails(mutant: str, kind: str, level: str, folders: dict[str, Path]) -> None:
    window = 0 if mutant == "causal mask dropped" else WINDOW  # a window is causal itself
    checked = verified(kind, folders[kind], level, MUTANTS[mutant], window)
    assert "at 32 bits logits differ" in checked.reason
