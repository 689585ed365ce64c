"""`rewrite --window`: a query sees its window and the first tokens, in every layer, and what is behind is freed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import onnx_kivi as kivi
from onnx_kivi.own_nodes import read_own_nodes
from onnx_kivi.rewrite.savings import cache_bytes
from onnx_kivi.runtime.backend import Backend
from onnx_kivi_models.tiny import tiny_decoder

Array = npt.NDArray[Any]

WINDOW, SINKS, TOKENS = 24, 2, 200
ROUNDING = 1e-4
IDS = np.random.default_rng(11).integers(0, 256, (1, TOKENS))


def config(bits: int, window: int = WINDOW, sinks: int = SINKS) -> kivi.KiviConfig:
    return kivi.KiviConfig(
        bits, bits, block_tokens=8, residual_length=8, sink_length=4, window=window, window_sinks=sinks
    )


def session_of(tiny: Path, folder: Path, chosen: kivi.KiviConfig, backend: str = "auto") -> kivi.Session:
    path = folder / f"{chosen.window}-{chosen.k_bits}.onnx"
    kivi.save(kivi.rewrite(tiny, chosen)[0], path)
    return kivi.Session(path, backend=backend)


def run(session: kivi.Session, begin: int, end: int, seen: Array | None = None) -> Array:
    mask = np.ones((1, end), np.int64) if seen is None else seen
    positions = np.arange(begin, end)[None]
    given = {"input_ids": IDS[:, begin:end], "attention_mask": mask, "position_ids": positions}
    return np.asarray(session.run(["logits"], given)[0])


def test_a_step_is_that_of_the_model_whose_mask_hides_the_same(tiny: Path, tmp_path: Path) -> None:
    windowed = session_of(tiny, tmp_path, config(32))
    whole = session_of(tiny, tmp_path, config(32, window=0, sinks=0))
    for end in range(1, 60):
        hidden = np.ones((1, end), np.int64)
        hidden[:, SINKS : max(SINKS, end - WINDOW)] = 0
        got, want = run(windowed, end - 1, end), run(whole, end - 1, end, hidden)
        np.testing.assert_allclose(got, want, atol=ROUNDING)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_behind_the_window_is_freed(tiny: Path, tmp_path: Path, backend: Backend, bits: int) -> None:
    chosen = config(bits)
    session = session_of(tiny, tmp_path, chosen, backend.name)
    held = []
    for begin in range(0, TOKENS, 5):
        run(session, begin, begin + 5)
        held.append(session.cache.nbytes)
    assert session.cache.sealed_tokens > 0
    assert max(held[len(held) // 2 :]) <= max(held[: len(held) // 2])
    exact = cache_bytes(kivi.inspect(tiny).sites, chosen, TOKENS) or 0
    # The native store counts the room that its residual has, which is that of a few tokens more.
    assert held[-1] == exact if backend.name == "numpy" else exact <= held[-1] <= 2 * exact
    assert session.cache.length == TOKENS


def test_a_window_of_the_models_own_stays_if_it_is_narrower() -> None:
    chosen = config(8)
    assert chosen.windowed(0, "self") == (WINDOW, SINKS)
    assert chosen.windowed(WINDOW + 1, "self") == (WINDOW, SINKS)
    assert chosen.windowed(WINDOW, "self") == (WINDOW, 0)
    assert chosen.windowed(0, "cross") == (0, 0)
    assert kivi.KiviConfig().windowed(7, "self") == (7, 0)


@pytest.mark.parametrize(("window", "sinks"), [(0, 1), (16, 5), (-1, 0), (16, -1)])
def test_bad_windows_are_refused(window: int, sinks: int) -> None:
    with pytest.raises(kivi.ConfigError, match="window"):
        config(8, window, sinks)


def test_the_command_says_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from onnx_kivi.cli.parser import main

    onnx.save(tiny_decoder(sharpness=1.4), tmp_path / "model.onnx")
    options = ["--window", "24", "--window-sinks", "2", "--residual", "8", "--block-tokens", "8"]
    out = tmp_path / "small.onnx"
    assert main(["rewrite", str(tmp_path / "model.onnx"), "-o", str(out), *options]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "the last 24 tokens and the first 2; what it no longer sees is lost" in printed
    nodes = read_own_nodes(out)
    assert nodes is not None
    assert {(a.window, a.window_sinks, a.evict) for a in nodes.slots} == {(24, 2, 1)}
