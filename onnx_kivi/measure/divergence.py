"""How far one model's predictions are from another's, token by token: the fields of llama.cpp's `--kl-divergence`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from ..arrays import FloatArray, IntArray

Doubles = npt.NDArray[np.float64]
PERCENTILES = (99.9, 99.0, 95.0, 90.0, 50.0, 10.0, 5.0, 1.0)


@dataclass(frozen=True, slots=True)
class Uncertain:
    """A mean, and its standard error over tokens."""

    value: float
    error: float

    @classmethod
    def of(cls, samples: Doubles) -> Self:
        """Of at least one sample; of one the error is 0."""
        return cls(float(samples.mean()), float(samples.std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else 0.0)


@dataclass(frozen=True, slots=True)
class KlDivergence:
    """kl: nats, with its largest, least and percentiles ("99.9" down to "1"). delta_p: change of the probability of the
    token that came, its mean, root mean square and percentiles. same_top: share of equal most likely tokens."""

    kl: Uncertain
    kl_max: float
    kl_min: float
    kl_percentiles: dict[str, float]
    delta_p: Uncertain
    delta_p_rms: Uncertain
    delta_p_percentiles: dict[str, float]
    same_top: Uncertain


@dataclass(frozen=True, slots=True)
class Comparison:
    """One window's tokens: KL, change of the probability of what came, and whether the likeliest token is the same."""

    kl: Doubles
    delta_p: Doubles
    same: Doubles

    @classmethod
    def of(cls, log_p: FloatArray, log_q: FloatArray, came: IntArray) -> Self:
        """Of log-probabilities (tokens, vocabulary), the model's and the reference's, and the tokens that came."""
        at = np.arange(len(came)), came
        kl = (np.exp(log_q) * (log_q - log_p)).sum(-1).astype(np.float64)
        delta = np.exp(log_p[at].astype(np.float64)) - np.exp(log_q[at].astype(np.float64))
        return cls(kl, delta, (log_p.argmax(-1) == log_q.argmax(-1)).astype(np.float64))


def summed_up(windows: list[Comparison]) -> KlDivergence:
    """The statistics over all tokens of at least one window."""
    kl, delta, same = (
        np.concatenate([getattr(window, name) for window in windows]) for name in ("kl", "delta_p", "same")
    )
    square = Uncertain.of(delta**2)
    rms = square.value**0.5
    return KlDivergence(
        kl=Uncertain.of(kl),
        kl_max=float(kl.max()),
        kl_min=float(kl.min()),
        kl_percentiles=_percentiles(kl),
        delta_p=Uncertain.of(delta),
        delta_p_rms=Uncertain(rms, square.error / (2 * rms) if rms else 0.0),
        delta_p_percentiles=_percentiles(delta),
        same_top=Uncertain.of(same),
    )


def _percentiles(samples: Doubles) -> dict[str, float]:
    return {f"{share:g}": float(np.percentile(samples, share)) for share in PERCENTILES}
