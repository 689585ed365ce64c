"""Is a rewritten model still the original? Runs both on the same tokens: prefill, a chunk, then single tokens.

At 32 bits the logits must agree to float rounding, which tells graph errors from quantization error; so a quantized
model is verified twice: its 32-bit sibling (the same graph, in a temporary file) to rounding, and the model itself by
KL divergence and top-1 agreement, past the point where every slot holds sealed blocks.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..graph import load, save
from ..own_nodes import read_own_nodes
from ..paths import model_path
from ..progress import Progress, silent
from ..rewrite.pipeline import dense, inspect
from ..rewrite.report import Report
from ..run.generate import check_seed
from ..run.session import NotRewrittenError
from ..spec import CROSS, DENSE_BITS, QUANTIZED_KV_SDPA, SdpaAttributes
from ..staging import staging_folder
from .replay import Divergence, Reference
from .synthetic import ENCODER_TOKENS

DENSE_PROMPTS = (24, 8)
# Rounding: ten times what onnxruntime's own optimizations change, within (floor, ceiling) of the logits' range.
ROUNDING = {"float": (1e-4, 1e-3), "float16": (5e-3, 2e-2), "bfloat16": (2e-2, 1e-1)}
# Inside a model that rounds activations to 8 bits, a last bit of difference can move one by a whole step of 1/127.
INT8_ROUNDING = (2e-2, 5e-2)
# Quantization: (mean KL in nats, top-1 agreement) that a sound cache of so many bits keeps even on random weights,
# whose logits are nearly tied; trained models stay far below (README, "What to expect").
LIMITS = {8: (1e-3, 0.9), 4: (0.1, 0.5), 3: (0.4, 0.3), 2: (1.5, 0.2)}


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of `verify`.

    max_rel_diff: largest difference of logits at 32 bits over the original's range of logits. mean_kl (nats) and
    top1_agreement: of the model as it is, over the tokens after the prefill. sealed_tokens: the least over its slots.
    tokens: how many were compared. bits: the fewest of any slot. ok is False exactly when `reason` says why.
    """

    max_rel_diff: float
    tolerance: float
    mean_kl: float
    top1_agreement: float
    sealed_tokens: int
    tokens: int
    bits: int
    reason: str

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.reason

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if not self.ok:
            return f"FAILED: {self.reason}"
        if self.bits == DENSE_BITS:
            return "equal to the original"
        kl, top1 = LIMITS[self.bits]
        return f"equal at 32 bits; as near as {self.bits} bits should be (KL up to {kl:g}, top-1 from {top1:g})"

    def to_dict(self) -> dict[str, Any]:
        """JSON object of the outcome."""
        return dataclasses.asdict(self) | {"ok": self.ok}


def verify(
    original: str | os.PathLike[str],
    rewritten: str | os.PathLike[str],
    *,
    prompt: int | None = None,
    steps: int = 4,
    batch: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    report: Report | None = None,
    progress: Progress = silent,
) -> Verification:
    """Compare a rewritten model with its original on random tokens, padded (row 0, on the left) and unpadded.

    prompt: tokens of the prefill (default: enough to seal several blocks in every slot, as far as the original
    runs). steps: single tokens at the end. batch: rows. tolerance: of the 32-bit comparison (default: calibrated by
    the original against itself unoptimized). report: what `inspect` says of the original, if that is known already.
    Raises UnsupportedModelError if either can't be run, ConfigError.
    """
    for name, value in (("prompt", prompt), ("steps", steps), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected an integer >= 1, got {value}")
    check_seed(seed)
    if tolerance is not None and not (np.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"tolerance: expected a number >= 0, got {tolerance}")
    slots = _slots(rewritten)
    report = report or inspect(original, cross=any(a.kind == CROSS for a in slots))
    quantized = [a for a in slots if min(a.k_bits, a.v_bits) < DENSE_BITS]
    progress("verify: running the original", 0.0)
    reference = Reference(original, report, _prompts(slots, prompt), steps, batch, seed, _encoder_tokens(slots))
    floor, ceiling = INT8_ROUNDING if report.int8_activations else ROUNDING[report.element]
    limit = tolerance if tolerance is not None else float(np.clip(10 * reference.noise(), floor, ceiling))
    if not quantized:
        progress("verify: running the rewritten model", 0.6)
        scores = reference.compare(rewritten)
        return _judge(scores, scores, limit, None)
    with staging_folder(Path(rewritten)) as folder:
        progress("verify: running its 32-bit sibling", 0.4)
        sibling = folder / "model.onnx"
        save(dense(load(rewritten)), sibling, link=True)
        exact = reference.compare(sibling)
    progress("verify: running the rewritten model", 0.7)
    return _judge(exact, reference.compare(rewritten), limit, min(min(a.k_bits, a.v_bits) for a in quantized))


def _judge(exact: Divergence, actual: Divergence, tolerance: float, bits: int | None) -> Verification:
    reasons = []
    if not exact.max_rel_diff <= tolerance:
        reasons.append(f"at 32 bits logits differ by {exact.max_rel_diff:.1e} of their range, over {tolerance:.1e}")
    if bits is not None:
        kl, top1 = LIMITS[bits]
        if not actual.prefill_rel_diff <= tolerance:
            reasons.append(f"the prefill, which reads no quantized token, differs by {actual.prefill_rel_diff:.1e}")
        if actual.sealed_tokens <= 0:
            reasons.append("no token was quantized in some slot; a longer prompt is needed")
        if not actual.mean_kl <= kl:
            reasons.append(f"mean KL {actual.mean_kl:.1e} is over {kl:.1e}, the limit at {bits} bits")
        if not actual.top1_agreement >= top1:
            reasons.append(f"top-1 agreement {actual.top1_agreement:.3f} is under {top1}, the limit at {bits} bits")
    return Verification(
        max_rel_diff=exact.max_rel_diff,
        tolerance=tolerance,
        mean_kl=actual.mean_kl,
        top1_agreement=actual.top1_agreement,
        sealed_tokens=actual.sealed_tokens,
        tokens=actual.tokens,
        bits=DENSE_BITS if bits is None else bits,
        reason="; ".join(reasons),
    )


def _slots(rewritten: str | os.PathLike[str]) -> list[SdpaAttributes]:
    """The attributes of the nodes, read without a run, of which an original may not be capable either."""
    nodes = read_own_nodes(model_path(rewritten))
    if nodes is None:
        raise NotRewrittenError(
            f"{rewritten}: expected a rewritten model, with {QUANTIZED_KV_SDPA.name} nodes, got one without; run "
            "onnx-kivi rewrite on it first"
        )
    return [*nodes.slots]


def _prompts(slots: list[SdpaAttributes], prompt: int | None) -> list[int]:
    """Prefill lengths to try, longest first; all but a dense model's last ones seal blocks in every slot."""
    if prompt is not None:
        return [prompt]
    dense = max(a.sink_length + a.residual_length for a in slots)
    block = max(a.block_tokens for a in slots)
    lengths = [dense + blocks * block for blocks in (4, 2, 1)]
    return lengths if any(min(a.k_bits, a.v_bits) < DENSE_BITS for a in slots) else [*lengths, *DENSE_PROMPTS]


def _encoder_tokens(slots: list[SdpaAttributes]) -> int:
    """Tokens of the encoder: enough to seal several blocks in the slots that store its keys and values."""
    cross = [a for a in slots if a.kind == CROSS]
    return max((a.sink_length + 2 * a.block_tokens + ENCODER_TOKENS for a in cross), default=ENCODER_TOKENS)
