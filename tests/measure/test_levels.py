"""What verify costs and says at each level: few tokens, one session at a time, and how far it is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

import onnx_kivi as kivi
from onnx_kivi.measure import reference
from onnx_kivi.measure.plans import LEVELS
from onnx_kivi.measure.replay import KEPT, Tokens
from onnx_kivi_models.tiny import tiny_config, tiny_decoder


@pytest.mark.parametrize("level", LEVELS)
def test_progress_grows_to_its_end(tiny: Path, rewritten: Callable[[int], Path], level: str) -> None:
    said: list[tuple[str, float]] = []
    kivi.verify(tiny, rewritten(8), level=level, progress=lambda what, fraction: said.append((what, fraction)))
    fractions = [fraction for _, fraction in said]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0.0
    assert fractions[-1] == 1.0
    assert len({what for what, _ in said}) >= 2


@pytest.mark.parametrize("level", LEVELS)
def test_one_session_is_open_at_a_time(
    tiny: Path, rewritten: Callable[[int], Path], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[weakref.ref[Any]] = []

    def watched(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_alone(*args: Any) -> Any:
            assert not any(session() for session in opened)
            session = make(*args)
            opened.append(weakref.ref(session))
            return session

        return make_alone

    for name in ("open_model", "Session"):
        monkeypatch.setattr(reference, name, watched(getattr(reference, name)))
    assert kivi.verify(tiny, rewritten(8), level=level).ok
    assert len(opened) == (2 if level == "quick" else 3)


def test_a_long_step_is_compared_at_its_ends() -> None:
    tokens = Tokens.random(1, 0, (3 * KEPT, 1), 256, 0)
    assert [*tokens.kept] == [*range(KEPT), *range(2 * KEPT, 3 * KEPT + 1)]


def test_a_quick_verification_seals_where_the_file_would_not_yet(tiny: Path, tmp_path: Path) -> None:
    kivi.save(kivi.rewrite(tiny, kivi.KiviConfig(block_tokens=1024, residual_length=4096))[0], tmp_path / "model.onnx")
    checked = kivi.verify(tiny, tmp_path / "model.onnx", level="quick")
    assert checked.ok
    assert checked.sealed_tokens == 32
    assert checked.mean_kl > 0


@pytest.mark.parametrize(("window", "unreached"), [(100, 0), (600, 600)])
def test_a_window_that_no_run_reaches_is_said(tmp_path: Path, window: int, unreached: int) -> None:
    original = tmp_path / "original.onnx"
    onnx.save(tiny_decoder(tiny_config(window=window), sharpness=1.4), original)
    kivi.save(kivi.rewrite(original)[0], tmp_path / "model.onnx")
    checked = kivi.verify(original, tmp_path / "model.onnx", level="quick")
    assert checked.ok
    assert checked.unreached_window == unreached
    assert ("no run reached beyond the window of 600" in checked.verdict) == bool(unreached)


def test_a_full_verification_looks_behind_a_wide_window(tmp_path: Path) -> None:
    original, path = tmp_path / "original.onnx", tmp_path / "model.onnx"
    onnx.save(tiny_decoder(tiny_config(window=600), sharpness=1.4), original)
    model = kivi.rewrite(original)[0]
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in ("window", "evict"):
                attribute.i = 0
    kivi.save(model, path)
    assert kivi.verify(original, path, level="quick").ok
    assert "at 32 bits logits differ" in kivi.verify(original, path).reason


def test_levels_are_two_and_quick_has_a_prompt_of_its_own(tiny: Path, rewritten: Callable[[int], Path]) -> None:
    with pytest.raises(kivi.ConfigError, match="level: expected quick or full, got 'some'"):
        kivi.verify(tiny, rewritten(8), level="some")
    with pytest.raises(kivi.ConfigError, match="prompt: expected none at level quick"):
        kivi.verify(tiny, rewritten(8), level="quick", prompt=8)
