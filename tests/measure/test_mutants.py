"""No level of verify passes an error of the graph, nor refuses a sound rewrite, whatever the model rounds itself."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx
import pytest

import onnx_kivi as kivi
from int8_models import KINDS
from mutants import MUTANTS, Edit
from onnx_kivi.measure import comparison
from onnx_kivi.measure.plans import LEVELS, QUICK
from onnx_kivi_models.tiny import tiny_config, tiny_decoder

WINDOW = 20
SMALL: dict[str, Any] = {"block_tokens": 16, "residual_length": 8, "sink_length": 2}
DEFAULT = {("float32", QUICK), ("int4", QUICK)}
CASES = [
    pytest.param(kind, level, marks=() if (kind, level) in DEFAULT else pytest.mark.slow)
    for kind in KINDS
    for level in LEVELS
]


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


@pytest.mark.parametrize("level", LEVELS)
def test_where_rounding_can_not_be_taken_out_the_originals_own_is_the_bound(
    level: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "unrounded", lambda _: None)
    checked = verified("dynamic", folders["dynamic"], level)
    assert checked.ok, checked.reason
    assert checked.own_kl is not None
    assert checked.as_is_kl is None
    assert not verified("dynamic", folders["dynamic"], level, MUTANTS["scale forgotten"]).ok
