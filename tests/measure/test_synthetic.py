"""Random inputs are those of the measurement that asked: verify feeds an original and its rewrite alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import onnx_kivi as kivi
from onnx_kivi.measure.synthetic import synthetic_stepper
from onnx_kivi.run.session import open_model
from onnx_kivi.run.stepper import Stepper
from tiny_variants import with_embeddings, with_state
from zoo import MODELS

IDS = np.array([[5, 6, 7], [8, 9, 10]])


@pytest.mark.parametrize("variant", [with_state, with_embeddings])
def test_models_that_take_more_than_tokens_are_verified(
    tiny: Path, tmp_path: Path, variant: Callable[[Path, Path], Path]
) -> None:
    original, path = variant(tiny, tmp_path), tmp_path / "small.onnx"
    config = kivi.KiviConfig(8, 8, block_tokens=16, residual_length=8, sink_length=2)
    kivi.save(kivi.rewrite(original, config, partial=True)[0], path)
    checked = kivi.verify(original, path)
    assert checked.ok, checked.reason
    assert checked.sealed_tokens > 0


def test_a_state_starts_at_random_only_when_asked(tiny: Path, tmp_path: Path) -> None:
    session = open_model(with_state(tiny, tmp_path))
    zero, random = Stepper(session), synthetic_stepper(session, batch=2)
    np.testing.assert_allclose(zero.step(IDS), Stepper(open_model(tiny)).step(IDS), atol=1e-3)
    assert np.abs(random.step(IDS)).max() > 100


def test_each_token_has_an_embedding_of_its_own_that_stays(tiny: Path, tmp_path: Path) -> None:
    session = open_model(with_embeddings(tiny, tmp_path))
    first, again, other = (synthetic_stepper(session, batch=2).step(ids) for ids in (IDS, IDS, IDS + 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1


def test_an_encoder_has_the_rows_and_tokens_asked_for() -> None:
    session = open_model(MODELS["optimum/bart/decoder_with_past_model"])
    long, short = (synthetic_stepper(session, batch=2, encoder_tokens=n) for n in (9, 5))
    assert np.abs(long.step(IDS[:, :1]) - short.step(IDS[:, :1])).max() > 1e-3
    keys = 2 * 4 * 8 * 4  # rows, heads, channels, bytes of one encoder's token
    assert long.cache_bytes - short.cache_bytes == 4 * keys * 2 * 2
