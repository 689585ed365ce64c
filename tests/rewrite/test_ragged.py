"""Ragged runs of every model of the zoo: each row as if it ran alone, or a refusal that says why."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import onnx_kivi as kivi
from limits import HALF_ROUNDING, ROUNDING, difference
from onnx_kivi.run.signature import ELEMENTS
from zoo import MODELS, REFUSED

Array = npt.NDArray[Any]

# Model: a part of the reason for which its rows must be of one length.
ONE_LENGTH = {
    **dict.fromkeys(("optimum/gemma", "optimum/gemma2", "optimum/gemma3", "optimum/gpt_oss"), "more than a mask"),
    **dict.fromkeys(("optimum/falcon_alibi", "optimum/gpt_neo"), "a mask that is not understood"),
    **{
        f"{style}/llama": "buffers hold equally many tokens"
        for style in ("dynamo-18-static", "dynamo-18-static-eager", "dynamo-23-static", "legacy-17-static")
    },
    "legacy-17-static-sdpa/llama": "buffers hold equally many tokens",
    **{
        f"optimum/{name}/{decoder}": "more than a mask"
        for name in ("bart", "m2m100", "whisper")
        for decoder in ("decoder_with_past_model", "decoder_model_merged")
    },
    "ortopt-optimum/whisper/decoder_with_past_model": "more than a mask",
}
LENGTHS, STEPS = (5, 21, 2), ((3, 3, 3), (1, 4, 2), (1, 1, 1))
SMALL = kivi.KiviConfig(32, 32, block_tokens=4, residual_length=4, sink_length=2)
RUNNABLE = [name for name in MODELS if name not in REFUSED]


def ragged_feeds(session: kivi.Session, rows: Sequence[Array], past: Sequence[int]) -> dict[str, Array]:
    """Feeds of a batch whose row b has `rows[b]` as its last tokens, behind past[b] others."""
    new = [len(row) for row in rows]
    width, total = max(new), max(past) + max(new)
    ids, mask = np.zeros((len(rows), width), np.int64), np.zeros((len(rows), total), np.int64)
    for b, row in enumerate(rows):
        ids[b, width - new[b] :] = row
        mask[b, total - past[b] - new[b] :] = 1
    positions = np.clip(mask.cumsum(1) - 1, 0, None)[:, -width:]
    known = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    feeds = {i.name: known[i.name].astype(ELEMENTS[i.type]) for i in session.get_inputs()}
    return feeds | ({"new_length": np.array(new)} if len({*new}) > 1 else {})


def rewritten(name: str, folder: Path, config: kivi.KiviConfig) -> Path:
    path = folder / "model.onnx"
    kivi.save(kivi.rewrite(MODELS[name], config)[0], path)
    return path


def logits(session: kivi.Session, rows: Sequence[Array], caches: Sequence[kivi.Cache]) -> Array:
    feeds = ragged_feeds(session, rows, [cache.length for cache in caches])
    return np.asarray(session.run(["logits"], feeds, cache=caches)[0], np.float32)


ALONE = [
    name
    for name in RUNNABLE
    # Dynamic quantization rounds all rows of a product by one scale: a row's neighbours change it, in the original too.
    if name not in ONE_LENGTH and "encoder" not in name and not name.startswith("ort-dynamic-int8")
]


@pytest.mark.parametrize("name", ALONE)
def test_each_row_is_as_if_it_ran_alone(name: str, tmp_path: Path) -> None:
    session = kivi.Session(rewritten(name, tmp_path, SMALL))
    if {i.name for i in session.get_inputs()} - {"input_ids", "attention_mask", "position_ids"}:
        pytest.skip("takes more than tokens")
    random = np.random.default_rng(3)
    together, alone = ([session.new_cache() for _ in LENGTHS] for _ in range(2))
    for counts in (LENGTHS, *STEPS):
        rows = [random.integers(3, 90, count) for count in counts]
        got = logits(session, rows, together)
        for b, (row, cache) in enumerate(zip(rows, alone, strict=True)):
            want = logits(session, [row], [cache])[0]
            limit = HALF_ROUNDING if "fp16" in name else ROUNDING
            assert difference(want, got[b, -len(row) :]) < limit
    assert [cache.length for cache in together] == [n + 3 + s + 1 for n, s in zip(LENGTHS, STEPS[1], strict=True)]


@pytest.mark.parametrize(("name", "reason"), ONE_LENGTH.items())
def test_a_model_that_counts_from_the_longest_row_says_so(name: str, reason: str, tmp_path: Path) -> None:
    report = kivi.inspect(MODELS[name])
    assert reason in report.one_length
    assert reason in str(report)
    session = kivi.Session(rewritten(name, tmp_path, SMALL))
    if {i.name for i in session.get_inputs()} - {"input_ids", "attention_mask", "position_ids"}:
        return
    caches = [session.new_cache() for _ in "ab"]
    rows = [np.arange(3, 8), np.arange(3, 8)]
    logits(session, rows, caches)
    caches[1].crop(3)
    with pytest.raises(kivi.CacheError, match=reason):
        logits(session, rows, caches)
    assert [cache.length for cache in caches] == [5, 3]


def test_the_table_of_refusals_is_whole() -> None:
    assert {name for name in RUNNABLE if kivi.inspect(MODELS[name]).one_length} == {*ONE_LENGTH}
