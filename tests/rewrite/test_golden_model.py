"""A model that version 1 wrote runs as it always did: bit for bit as what is rewritten of the same original today."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import onnx_kivi as kivi
from goldens import CONFIG, ORIGINAL, REWRITTEN
from onnx_kivi.run.stepper import Stepper
from stepping import assert_same


def test_the_recorded_rewrite_runs_as_todays_of_the_same_original(tmp_path: Path) -> None:
    kivi.save(kivi.rewrite(ORIGINAL, CONFIG)[0], tmp_path / "model.onnx")
    recorded, fresh = kivi.Session(REWRITTEN), kivi.Session(tmp_path / "model.onnx")
    old, new = recorded.new_cache(), fresh.new_cache()
    for ids in (np.arange(64)[None] % 32, np.arange(7, 12)[None], np.array([[3]])):
        expected, got = (Stepper(s, c).step(ids) for s, c in ((recorded, old), (fresh, new)))
        np.testing.assert_array_equal(expected, got)
    assert old.sealed_tokens >= 48
    assert_same(recorded.backend.export_state(old.handle), fresh.backend.export_state(new.handle))
