"""Perplexity of a decoder on a text, and how far it is from its original: KL divergence and top-1 agreement.

Windows of the text are fed teacher-forced in chunks, so that a quantized cache is read as generation would read it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..arrays import FloatArray, IntArray
from ..errors import ConfigError
from ..progress import Progress, silent
from ..run.stepper import Stepper
from .divergence import Comparison, KlDivergence, summed_up

CHUNK = 64


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Perplexity; against a reference also its perplexity, mean KL (nats) and the share of equal top tokens.

    sealed_tokens: tokens that were quantized at the end of a window, the least over windows and slots. divergence: more
    about the distance to the reference.
    """

    ppl: float
    reference_ppl: float | None
    mean_kl: float | None
    top1_agreement: float | None
    tokens: int
    sealed_tokens: int
    divergence: KlDivergence | None


def evaluate(
    stepper: Stepper,
    ids: list[int],
    *,
    reference: Stepper | None = None,
    window: int = 1024,
    windows: int = 6,
    progress: Progress = silent,
) -> Evaluation:
    """Evaluate on `windows` windows of `window` tokens, spread evenly over `ids`.

    Raises ConfigError if the text is shorter than one window or a number is out of range.
    """
    if window < 2 or windows < 1:
        raise ConfigError(f"window, windows: expected at least 2 and 1, got {window} and {windows}")
    if len(ids) < window:
        raise ConfigError(f"text: expected at least {window} tokens, got {len(ids)}; choose a smaller --window")
    starts = np.linspace(0, len(ids) - window, windows).astype(int)
    loss, reference_loss, sealed = [], [], []
    compared: list[Comparison] = []
    for n, start in enumerate(starts):
        progress(f"window {n + 1} of {windows}", n / windows)
        tokens = np.asarray(ids[start : start + window], np.int64)
        p = _log_probabilities(stepper, tokens)
        loss.append(-p[np.arange(window - 1), tokens[1:]])
        sealed.append(stepper.sealed_tokens)
        if reference is not None:
            q = _log_probabilities(reference, tokens)
            reference_loss.append(-q[np.arange(window - 1), tokens[1:]])
            compared.append(Comparison.of(p, q, tokens[1:]))
    divergence = summed_up(compared) if compared else None
    return Evaluation(
        ppl=float(np.exp(np.mean(loss))),
        reference_ppl=float(np.exp(np.mean(reference_loss))) if reference_loss else None,
        mean_kl=divergence.kl.value if divergence else None,
        top1_agreement=divergence.same_top.value if divergence else None,
        tokens=windows * (window - 1),
        sealed_tokens=min(sealed),
        divergence=divergence,
    )


def log_softmax(x: FloatArray) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis, in float64."""
    z = x.astype(np.float64) - x.max(-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(-1, keepdims=True)))


def _log_probabilities(stepper: Stepper, tokens: IntArray) -> FloatArray:
    """What the decoder expects after each token but the last, (window - 1, vocabulary)."""
    stepper.restart()
    chunks = [tokens[i : i + CHUNK] for i in range(0, len(tokens), CHUNK)]
    logits = np.concatenate([log_softmax(stepper.step(c[None])[0]).astype(np.float32) for c in chunks])
    return logits[:-1]
