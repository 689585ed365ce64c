"""Replays fixed tokens through an exported decoder and records its logits, as onnxruntime gives them.

Contract: `record(folder)` writes replay.npz: `ids` and `mask` (B, T), `ends` (the steps: tokens 0 to ends[0], then to
ends[1], ...), `logits` (B, T, V), and under their own names the inputs that stay the same in each step. A model whose
last logits don't depend on its cache is an error: such a model proves nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Array = npt.NDArray[Any]

ENDS = (8, 11, 12, 13, 14)
SINGLE_ENDS = tuple(range(1, 9))
PADDING = 3
ENCODER_TOKENS = 8
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
MATTERS = 0.05
VOCABULARY = 100


def record(model: Path, padding: int = PADDING) -> None:
    """Write replay.npz beside `model`; `padding` tokens on the left of the first of two rows."""
    session = _session(model)
    seq2seq = any(value.name == "encoder_hidden_states" or "encoder" in value.name for value in session.get_inputs())
    ends = SINGLE_ENDS if seq2seq else ENDS
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, ends[-1]))
    mask = np.ones_like(ids)
    if not seq2seq:
        mask[0, :padding] = 0
    fixed = _fixed(session)
    try:
        logits = replay(session, model, ids, mask, ends, fixed)
    except Exception:
        ends = (ENDS[0], *range(ENDS[0] + 1, ENDS[-1] + 1))
        logits = replay(session, model, ids, mask, ends, fixed)
    other = ids.copy()
    other[:, :-1] = ids[:, -2::-1]
    change = np.abs(replay(session, model, other, mask, ends, fixed)[1, -1] - logits[1, -1]).max() / np.ptp(logits)
    if not change > MATTERS or not np.isfinite(logits[mask == 1]).all():
        raise RuntimeError(f"{model}: other earlier tokens change the last logits by {change:.1e} of their range")
    np.savez_compressed(
        model.parent / "replay.npz", ids=ids, mask=mask, ends=ends, logits=logits.astype(np.float32), **fixed
    )


def replay(
    session: ort.InferenceSession, model: Path, ids: Array, mask: Array, ends: tuple[int, ...], fixed: dict[str, Array]
) -> Array:
    """Logits (B, T, V) of all tokens, fed in steps."""
    past = _empty_past(session, model, len(ids), fixed)
    names = [value.name for value in session.get_outputs()]
    parts, start = [], 0
    for end in ends:
        known = {
            "input_ids": ids[:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": np.clip(mask[:, :end].cumsum(1) - 1, 0, None)[:, start:],
            "cache_position": np.arange(start, end),
            "use_cache_branch": np.array([True]),
            **fixed,
            **past,
        }
        feeds = {value.name: known[value.name].astype(TYPES[value.type]) for value in session.get_inputs()}
        results = dict(zip(names, session.run(None, feeds), strict=True))
        past = {name: _carried(name, results, past) for name in past}
        parts.append(results["logits"])
        start = end
    return np.concatenate(parts, 1)


def _session(model: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _carried(name: str, results: dict[str, Array], past: dict[str, Array]) -> Array:
    present = results.get(name.replace("past_key_values", "present"))
    return past[name] if present is None or "encoder" in name else present


def _fixed(session: ort.InferenceSession) -> dict[str, Array]:
    """What the encoder would give: its states, its mask, and its keys and values."""
    generator = np.random.default_rng(1)
    fixed: dict[str, Array] = {}
    for value in session.get_inputs():
        if value.name == "encoder_attention_mask":
            fixed[value.name] = np.ones((2, ENCODER_TOKENS), np.int64)
        elif "encoder" in value.name:
            shape = [2, *value.shape[1:]]
            shape = [ENCODER_TOKENS if isinstance(size, str) else size for size in shape]
            fixed[value.name] = generator.standard_normal(shape).astype(TYPES[value.type])
    return fixed


def _empty_past(session: ort.InferenceSession, model: Path, batch: int, fixed: dict[str, Array]) -> dict[str, Array]:
    genai = model.parent / "genai_config.json"
    head_size = json.loads(genai.read_text())["model"]["decoder"]["head_size"] if genai.exists() else 0
    past = {}
    for value in session.get_inputs():
        if value.name.startswith("past") and value.name not in fixed:
            sizes = [size if isinstance(size, int) else 0 for size in value.shape]
            past[value.name] = np.zeros((batch, *sizes[1:-1], sizes[-1] or head_size), TYPES[value.type])
    return past
