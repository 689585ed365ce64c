"""Is a rewritten model still the original? Runs both on the same tokens: prefill, a chunk, then single tokens.

At 32 bits the logits must agree to float rounding, which tells graph errors from quantization error; so a quantized
model is verified twice: its graph with nothing quantized to rounding, and quantized by KL divergence and top-1
agreement, past the point where every slot holds sealed blocks. Where the model itself rounds activations to 8 bits,
both are done on copies that don't, and the model as it is may be no further from the original than that is from itself
when rounding moves it a little.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..own_nodes import read_own_nodes
from ..paths import model_path
from ..progress import Progress, silent
from ..rewrite.pipeline import inspect
from ..rewrite.report import Report
from ..run.sampling import check_seed
from ..run.session import NotRewrittenError
from ..spec import DENSE_BITS, QUANTIZED_KV_SDPA, SdpaAttributes
from ..staging import staging_folder
from .comparison import Compared, Comparison
from .plans import FULL, LEVELS, QUICK, plan

# Rounding: ten times what onnxruntime's own optimizations change, within (floor, ceiling) of the logits' range.
ROUNDING = {"float": (1e-4, 1e-3), "float16": (5e-3, 2e-2), "bfloat16": (2e-2, 1e-1)}
OWN_CHANGES = 10
# Quantization: (mean KL in nats, top-1 agreement) that a sound cache of so many bits keeps even on random weights,
# whose logits are nearly tied; trained models stay far below (README, "What to expect").
LIMITS = {8: (1e-3, 0.9), 4: (0.1, 0.5), 3: (0.4, 0.3), 2: (1.5, 0.2)}


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of `verify`.

    max_rel_diff: largest difference of logits at 32 bits over the original's range of logits. mean_kl (nats) and
    top1_agreement: of the model as quantized, over the tokens after the prefill. sealed_tokens: the least over its
    slots. tokens: how many were compared. bits: the fewest of any slot. own_kl: mean KL that the original has to itself
    when rounding moves it, and as_is_kl that of the rewritten model to the original, where these round activations to 8
    bits; the other figures are then of copies that don't. unreached_window: the widest that no run was long enough for,
    0 if there is none. ok is False exactly when `reason` says why.
    """

    max_rel_diff: float
    tolerance: float
    mean_kl: float
    top1_agreement: float
    sealed_tokens: int
    tokens: int
    bits: int
    reason: str
    level: str = FULL
    own_kl: float | None = None
    as_is_kl: float | None = None
    unreached_window: int = 0

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.reason

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if not self.ok:
            return f"FAILED: {self.reason}"
        window = f"; no run reached beyond the window of {self.unreached_window:,}" * bool(self.unreached_window)
        if self.bits == DENSE_BITS:
            return f"equal to the original{window}"
        kl, top1 = LIMITS[self.bits]
        return f"equal at 32 bits; as near as {self.bits} bits should be (KL up to {kl:g}, top-1 from {top1:g}){window}"

    def to_dict(self) -> dict[str, Any]:
        """JSON object of the outcome."""
        return dataclasses.asdict(self) | {"ok": self.ok}


def verify(
    original: str | os.PathLike[str],
    rewritten: str | os.PathLike[str],
    *,
    level: str = FULL,
    prompt: int | None = None,
    steps: int | None = None,
    batch: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    report: Report | None = None,
    progress: Progress = silent,
) -> Verification:
    """Compare a rewritten model with its original on random tokens, padded (row 0, on the left) and unpadded.

    level: `full` runs the file as it is; `quick` its graph with small blocks, on few tokens. prompt: tokens of a full
    run's prefill (default: enough to seal several blocks in every slot, as far as the original runs). steps: single
    tokens at the end (default: 4, or 2 at `quick`). batch: rows. tolerance: of the 32-bit comparison (default:
    calibrated by the original against itself unoptimized). report: what `inspect` says of the original, if that is
    known already. Raises UnsupportedModelError if either can't be run, ConfigError.
    """
    _check(level, prompt, steps, batch, tolerance)
    check_seed(seed)
    slots = _slots(rewritten)
    report = report or inspect(original)
    planned = plan(level, slots, report, prompt, steps, batch)
    bits = min(min(a.k_bits, a.v_bits) for a in slots)
    with staging_folder(Path(rewritten)) as folder:
        compared = Comparison(report, planned, seed, folder, progress).run(Path(original), Path(rewritten))
        return _outcome(compared, tolerance, bits)


@dataclasses.dataclass(frozen=True, slots=True)
class _Limits:
    """max_rel_diff, mean_kl, top1: of what is compared. as_is_kl: of the model as it is; None if that is the same."""

    max_rel_diff: float
    mean_kl: float
    top1: float
    as_is_kl: float | None = None


def _outcome(compared: Compared, tolerance: float | None, bits: int) -> Verification:
    exact, actual, as_is, own = compared.exact, compared.actual, compared.as_is, compared.own
    limits = _limits(compared, tolerance, bits)
    return Verification(
        max_rel_diff=exact.max_rel_diff,
        tolerance=limits.max_rel_diff,
        mean_kl=actual.mean_kl,
        top1_agreement=actual.top1_agreement,
        sealed_tokens=actual.sealed_tokens,
        tokens=actual.tokens,
        bits=bits,
        reason="; ".join(_reasons(compared, limits, bits)),
        level=compared.level,
        own_kl=own.mean_kl if own else None,
        as_is_kl=as_is.mean_kl if as_is else None,
        unreached_window=compared.unreached_window,
    )


def _limits(compared: Compared, tolerance: float | None, bits: int) -> _Limits:
    """A model that rounds activations is allowed what rounding makes of itself, as measured, and no constant."""
    kl, top1 = LIMITS.get(bits, (0.0, 1.0))
    own = compared.own
    rounding = _rounding(compared, tolerance)
    if own is None:
        return _Limits(rounding, kl, top1)
    if compared.as_is is not None:
        return _Limits(rounding, kl, top1, kl + OWN_CHANGES * own.mean_kl)
    return _Limits(
        max(rounding, OWN_CHANGES * own.max_rel_diff), kl + OWN_CHANGES * own.mean_kl, min(top1, own.top1_agreement)
    )


def _rounding(compared: Compared, tolerance: float | None) -> float:
    """The tolerance at 32 bits; what the original's own optimizations change is measured only where it decides."""
    if tolerance is not None:
        return tolerance
    floor, ceiling = ROUNDING[compared.element]
    if max(compared.exact.max_rel_diff, compared.actual.prefill_rel_diff) <= floor:
        return floor
    return float(np.clip(OWN_CHANGES * compared.unoptimized(), floor, ceiling))


def _reasons(compared: Compared, limits: _Limits, bits: int) -> Iterator[str]:
    exact, actual, as_is = compared.exact, compared.actual, compared.as_is
    if not exact.max_rel_diff <= limits.max_rel_diff:
        yield f"at 32 bits logits differ by {exact.max_rel_diff:.1e} of their range, over {limits.max_rel_diff:.1e}"
    if bits == DENSE_BITS:
        return
    if not actual.prefill_rel_diff <= limits.max_rel_diff:
        yield f"the prefill, which reads no quantized token, differs by {actual.prefill_rel_diff:.1e}"
    if actual.sealed_tokens <= 0:
        yield "no token was quantized in some slot; a longer prompt is needed"
    if not actual.mean_kl <= limits.mean_kl:
        yield f"mean KL {actual.mean_kl:.1e} is over {limits.mean_kl:.1e}, the limit at {bits} bits"
    if not actual.top1_agreement >= limits.top1:
        yield f"top-1 agreement {actual.top1_agreement:.3f} is under {limits.top1}, the limit at {bits} bits"
    if as_is is not None and limits.as_is_kl is not None and not as_is.mean_kl <= limits.as_is_kl:
        yield (
            f"with its activations in 8 bits, mean KL {as_is.mean_kl:.1e} is over {limits.as_is_kl:.1e}, which allows "
            "for what a rounding makes of the original"
        )


def _check(level: str, prompt: int | None, steps: int | None, batch: int, tolerance: float | None) -> None:
    if level not in LEVELS:
        raise ConfigError(f"level: expected {' or '.join(LEVELS)}, got {level!r}")
    for name, value in (("prompt", prompt), ("steps", steps), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected an integer >= 1, got {value}")
    if level == QUICK and prompt is not None:
        raise ConfigError(f"prompt: expected none at level {QUICK}, which has its own, got {prompt}; choose {FULL}")
    if tolerance is not None and not (np.isfinite(tolerance) and tolerance >= 0):
        raise ConfigError(f"tolerance: expected a number >= 0, got {tolerance}")


def _slots(rewritten: str | os.PathLike[str]) -> list[SdpaAttributes]:
    """The attributes of the nodes, read without a run, of which an original may not be capable either."""
    nodes = read_own_nodes(model_path(rewritten))
    if nodes is None:
        raise NotRewrittenError(
            f"{rewritten}: expected a rewritten model, with {QUANTIZED_KV_SDPA.name} nodes, got one without; run "
            "onnx-kivi rewrite on it first"
        )
    return [*nodes.slots]
