"""Edited models: whatever our nodes say that the rewriter would not have written is refused before a session exists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper

import onnx_kivi as kivi
from hostile.edits import EDITS, GHOST_EDITS, attending, opening
from onnx_kivi.own_nodes import read_own_nodes


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_is_refused_at_load(name: str, rewritten: Callable[[int], Path], tmp_path: Path) -> None:
    edit, words = EDITS[name]
    model = onnx.load(rewritten(8))
    edit(model)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    for given_as in (tmp_path, model.SerializeToString()):
        with pytest.raises((kivi.UnsupportedModelError, kivi.SpecMismatchError), match=words) as refusal:
            kivi.Session(given_as)
        assert "\n" not in str(refusal.value)
    with pytest.raises(kivi.KiviError, match=words):
        kivi.verify(rewritten(8), tmp_path)


@pytest.mark.parametrize("name", GHOST_EDITS)
def test_an_edited_model_with_ghost_io_is_refused_at_load(name: str, tiny: Path) -> None:
    edit, words = GHOST_EDITS[name]
    model, _ = kivi.rewrite(tiny, kivi.KiviConfig(io="ghost"))
    nodes = read_own_nodes(model.SerializeToString())
    assert nodes is not None
    assert nodes.io == "ghost"
    assert nodes.past == ("past_key_values.0.key", "past_key_values.0.value")
    assert nodes.present == ("present.0.key", "present.0.value")
    edit(model)
    with pytest.raises((kivi.UnsupportedModelError, kivi.SpecMismatchError), match=words) as refusal:
        kivi.Session(model.SerializeToString())
    assert "\n" not in str(refusal.value)


def test_the_unedited_model_is_read_as_onnx_reads_it(rewritten: Callable[[int], Path]) -> None:
    nodes = read_own_nodes(rewritten(8))
    model = onnx.load(rewritten(8))
    assert nodes is not None
    for own, proto in zip((nodes.step, *nodes.slots), (opening(model), *attending(model)), strict=True):
        values = {a.name: helper.get_attribute_value(a) for a in proto.attribute}
        assert own.to_wire() == {n: v.decode() if isinstance(v, bytes) else v for n, v in values.items()}


def test_a_model_of_none_of_our_nodes_has_none(tiny: Path) -> None:
    assert read_own_nodes(tiny) is None


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"\x0a\xff\xff\xff\xff\x0f", b"\x3a\x80", b"\x0b\x0c", b"\x3a\x02\x0a\x05"]
)
def test_what_is_no_message_is_refused_or_has_no_nodes(content: bytes) -> None:
    try:
        assert read_own_nodes(content) is None
    except kivi.UnsupportedModelError as error:
        assert "expected an ONNX model" in str(error)  # noqa: PT017
