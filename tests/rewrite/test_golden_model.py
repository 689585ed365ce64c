"""A recorded model is rewritten to the recorded bytes, whichever versions of onnx and protobuf are installed."""

from __future__ import annotations

import numpy as np

import onnx_kivi as kivi
from goldens import REWRITTEN, rewritten_bytes, unchanged
from onnx_kivi.run.stepper import Stepper


def test_the_recorded_model_is_rewritten_as_it_was() -> None:
    unchanged(REWRITTEN, rewritten_bytes())


def test_the_recorded_rewrite_still_runs_and_seals() -> None:
    session = kivi.Session(REWRITTEN)
    cache = session.new_cache()
    logits = Stepper(session, cache).step(np.arange(64)[None] % 32)
    assert np.isfinite(logits).all()
    assert cache.sealed_tokens >= 48
