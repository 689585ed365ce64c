"""The bytes that `inspect` promises are those that a real cache holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import onnx_kivi as kivi
from graphs import BATCH, decoder, feeds
from onnx_kivi.rewrite.savings import CONTEXTS, cache_bytes, original_bytes, savings


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


def test_rows_for_people() -> None:
    report = kivi.inspect(decoder())
    rows = savings(report.sites)
    assert [row["tokens"] for row in rows] == list(CONTEXTS)
    assert all(row["original"] > row["bits_8"] > row["bits_4"] > row["bits_2"] for row in rows)
    assert rows[0]["original"] == 4096 * 2 * (8 + 8) * 4
    assert "cache of 4,096 tokens" in str(report)
    assert savings(()) == []
