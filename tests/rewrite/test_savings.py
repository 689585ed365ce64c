"""The bytes that `inspect` promises are those that a real cache holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnx_kivi as kivi
from graphs import BATCH, decoder, feeds
from onnx_kivi.config import PRESETS
from onnx_kivi.rewrite.savings import CONTEXTS, bits_of, cache_bytes, original_bytes, savings


@pytest.mark.parametrize("bits", [32, 8, 4, 2])
@pytest.mark.parametrize(("residual", "sinks", "group"), [(0, 0, 0), (8, 2, 5), (5, 0, 64)])
@pytest.mark.parametrize("tokens", [3, 40])
def test_promised_bytes_are_held(tmp_path: Path, bits: int, residual: int, sinks: int, group: int, tokens: int) -> None:
    config = kivi.KiviConfig(bits, bits, 8, group, residual, sinks)
    model = decoder()
    rewritten, report = kivi.rewrite(model, config)
    kivi.save(rewritten, tmp_path / "out.onnx")
    session = kivi.Session(tmp_path / "out.onnx", backend="numpy")
    session.run(None, feeds(np.random.default_rng(0), 0, tokens, model))
    assert (session.cache.sealed_tokens > 0) == (bits < 32 and tokens == 40)
    assert session.cache.nbytes == BATCH * (cache_bytes(report.sites, config, tokens) or 0)
    assert session.cache.dense_nbytes == BATCH * (original_bytes(report.sites, tokens) or 0)


@pytest.mark.parametrize("preset", PRESETS)
def test_promised_bytes_of_presets_are_held(tmp_path: Path, preset: str) -> None:
    config = kivi.KiviConfig.of_preset(preset, block_tokens=8, v_group_size=5, residual_length=4, sink_length=1)
    model = decoder()
    rewritten, report = kivi.rewrite(model, config)
    kivi.save(rewritten, tmp_path / "out.onnx")
    session = kivi.Session(tmp_path / "out.onnx", backend="numpy")
    session.run(None, feeds(np.random.default_rng(0), 0, 40, model))
    assert session.cache.sealed_tokens > 0
    assert session.cache.nbytes == BATCH * (cache_bytes(report.sites, config, 40) or 0)


def test_each_preset_takes_fewer_bits_than_the_one_before() -> None:
    sites = kivi.inspect(decoder()).sites
    bits = [bits_of(sites, kivi.KiviConfig.of_preset(name), 16384) or 0 for name in PRESETS]
    assert bits == sorted(bits, reverse=True)
    dense = kivi.KiviConfig(32, 32)
    assert bits_of(sites, dense, 16384) == 32
    assert bits_of((), dense, 16384) is None


def test_rows_for_people() -> None:
    report = kivi.inspect(decoder())
    rows = savings(report.sites)
    assert [row["tokens"] for row in rows] == list(CONTEXTS)
    assert all(row["original"] > row["bits_8"] > row["bits_4"] > row["bits_2"] for row in rows)
    assert rows[0]["original"] == 4096 * 2 * (8 + 8) * 4
    assert "cache of 4,096 tokens" in str(report)
    assert savings(()) == []
