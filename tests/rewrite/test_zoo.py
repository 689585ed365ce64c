"""Every model of models/zoo: at 32 bits it gives the recorded logits; at 8 bits it seals, stays close, and differs.

The models come from real exporters with random weights under which attention decides the logits, so a rewrite that lost
the cache, the mask or a scale could not pass. A model that is refused must be in zoo.REFUSED, with its reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import onnx_kivi as kivi
from limits import EIGHT_BITS, HALF_ROUNDING, ROUNDING, difference, original_stepper
from onnx_kivi.measure.plans import LEVELS
from onnx_kivi.measure.synthetic import synthetic_stepper
from onnx_kivi.run.signature import ELEMENTS
from zoo import INT8, MODELS, README, REFUSED, readme

Array = npt.NDArray[Any]


BLOCK = 16
SEALED = 4 * BLOCK
QUANTIZED_ENDS = (SEALED, SEALED + 8, SEALED + 9, SEALED + 10, SEALED + 11)


def replay(session: kivi.Session, recorded: dict[str, Array]) -> list[Array]:
    """Logits of each recorded step."""
    mask = recorded["mask"]
    outputs, start = [], 0
    for end in recorded["ends"]:
        known = {
            **recorded,
            "input_ids": recorded["ids"][:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": np.clip(mask[:, :end].cumsum(1) - 1, 0, None)[:, start:],
            "cache_position": np.arange(start, end),
            "use_cache_branch": np.array([True]),
        }
        feeds = {i.name: known[i.name].astype(ELEMENTS[i.type]) for i in session.get_inputs()}
        outputs.append(session.run(["logits"], feeds)[0].astype(np.float32))
        start = end
    return outputs


def rewritten(name: str, folder: Path, config: kivi.KiviConfig) -> Path:
    """The model `name`, rewritten and saved."""
    path = folder / "model.onnx"
    kivi.save(kivi.rewrite(MODELS[name], config)[0], path)
    return path


def rounding(name: str) -> float:
    """How far float rounding alone can take the model's logits, as a share of their range."""
    return EIGHT_BITS if name in INT8 else HALF_ROUNDING if "fp16" in name else ROUNDING


def test_the_zoo_is_there() -> None:
    assert len(MODELS) >= 70


def test_the_zoos_table_is_current() -> None:
    assert README.read_text(encoding="utf-8") == readme(), "run: python tests/zoo.py"


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(name: str) -> None:
    with pytest.raises(kivi.UnsupportedModelError, match=REFUSED[name]):
        kivi.rewrite(MODELS[name])


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_dense_rewrite_gives_the_recorded_logits(name: str, tmp_path: Path) -> None:
    with np.load(MODELS[name].parent / "replay.npz") as file:
        recorded = dict(file)
    session = kivi.Session(rewritten(name, tmp_path, kivi.KiviConfig(k_bits=32, v_bits=32)))
    logits = np.concatenate(replay(session, recorded), 1)
    real = recorded["mask"] == 1
    assert difference(recorded["logits"][real], logits[real]) <= rounding(name)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in REFUSED])
def test_quantized_rewrite_is_close_and_not_identical(name: str, tmp_path: Path) -> None:
    config = kivi.KiviConfig(block_tokens=BLOCK, residual_length=0, sink_length=0)
    session = kivi.Session(rewritten(name, tmp_path, config))
    cache = session.new_cache()
    ends = range(1, QUANTIZED_ENDS[-1] + 1) if "with_past" in name else QUANTIZED_ENDS
    ids = np.random.default_rng(5).integers(3, 100, (1, QUANTIZED_ENDS[-1]))
    original, quantized = original_stepper(MODELS[name]), synthetic_stepper(session, cache)
    start, differences = 0, []
    for end in ends:
        differences.append(difference(original.step(ids[:, start:end]), quantized.step(ids[:, start:end])))
        start = end
    assert cache.sealed_tokens >= SEALED
    assert differences[0] <= rounding(name)
    assert 0 < max(differences[1:]) <= EIGHT_BITS


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", INT8)
def test_models_that_round_activations_are_verified_to_float_rounding(name: str, level: str, tmp_path: Path) -> None:
    config = kivi.KiviConfig(block_tokens=BLOCK, residual_length=0, sink_length=0)
    checked = kivi.verify(MODELS[name], rewritten(name, tmp_path, config), level=level)
    assert checked.ok, checked.reason
    assert checked.sealed_tokens > 0
    assert checked.max_rel_diff <= ROUNDING
    assert checked.tolerance == ROUNDING


def test_all_layers_of_a_static_cache_share_their_checks() -> None:
    model, report = kivi.rewrite(MODELS["dynamo-18-static/llama"])
    assert len(report.sites) == 2
    for demand in ("tokens_must_be_written_where_the_cache_ends", "mask_must_hide_what_is_not_written"):
        assert sum(demand in node.name for node in model.graph.node) == 1
