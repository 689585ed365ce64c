"""Chooses a token from logits: greedily, or at random after temperature, top-k, top-p (nucleus) and min-p.

Nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751. min-p: Nguyen et al. 2024, arXiv 2407.01082. Repetition
penalty: Keskar et al. 2019, arXiv 1909.05858, section 4.1. They apply in the order in which transformers has them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..arrays import Array, FloatArray, IntArray
from ..errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy. top_k: the most likely so many, 0 = all.

    top_p: the fewest that reach this probability. min_p: those at least this share as likely as the likeliest.
    repetition_penalty: above 1 makes tokens less likely that the prompt or the answer has. seed: None = any. Raises
    ConfigError for what is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature: expected a number >= 0, got {self.temperature!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ConfigError(f"top_p: expected 0 < top_p <= 1, got {self.top_p!r}")
        if not (isinstance(self.top_k, int | np.integer) and self.top_k >= 0):
            raise ConfigError(f"top_k: expected an integer >= 0, got {self.top_k!r}")
        if not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ConfigError(f"min_p: expected 0 <= min_p <= 1, got {self.min_p!r}")
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ConfigError(f"repetition_penalty: expected a number > 0, got {self.repetition_penalty!r}")
        check_seed(self.seed)


def check_seed(seed: int | None) -> None:
    """Raise ConfigError unless random numbers can start from `seed`."""
    if seed is not None and (not isinstance(seed, int | np.integer) or seed < 0):
        raise ConfigError(f"seed: expected an integer >= 0, got {seed!r}")


class Sampler:
    """The choices of one sequence: its random numbers, and the tokens that it has."""

    def __init__(self, options: Sampling, prompt: Iterable[int]) -> None:
        self._options = options
        self._random = np.random.default_rng(options.seed)
        self._seen = set(map(int, prompt)) if options.repetition_penalty != 1 else None

    def choose(self, logits: FloatArray) -> int:
        """One token id from logits (vocabulary,). Raises UnsupportedModelError for logits that are no numbers."""
        best = logits.max()
        if not np.isfinite(best):
            raise UnsupportedModelError(f"logits: expected numbers, got {best}; the model fails on these tokens")
        if self._seen:
            logits = _penalized(logits, self._seen, self._options.repetition_penalty)
        token = draw(logits, self._options, self._random)
        if self._seen is not None:
            self._seen.add(token)
        return token


def draw(logits: FloatArray, options: Sampling, random: np.random.Generator) -> int:
    """One token id from logits (vocabulary,)."""
    if options.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / options.temperature
    p = np.exp(scaled - scaled.max())
    kept = _likeliest(p, options.top_k) if 0 < options.top_k < p.size else np.arange(p.size)
    kept = _nucleus(p, kept, options.top_p) if options.top_p < 1 else kept
    if options.min_p:
        kept = kept[p[kept] >= options.min_p * p[kept].max()]
    sums = np.cumsum(p[kept])
    return int(kept[min(int(np.searchsorted(sums, random.random() * sums[-1], side="right")), kept.size - 1)])


def log_probs(logits: FloatArray, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Log-probability of a token, and the likeliest `count` tokens with theirs, in order: of the model, unsampled."""
    wide = logits.astype(np.float64)
    scale = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    best = _likeliest(wide, min(count, wide.size)) if count else np.zeros(0, np.int64)
    return float(wide[token] - scale), tuple((int(i), float(wide[i] - scale)) for i in best)


def _likeliest(p: Array, count: int) -> IntArray:
    """The indices of the largest, largest first."""
    largest = np.argpartition(-p, count - 1)[:count]
    ordered: IntArray = largest[np.lexsort((largest, -p[largest]))]
    return ordered


def _nucleus(p: Array, kept: IntArray, top_p: float) -> IntArray:
    """The fewest of `kept`, likeliest first, that reach top_p of their sum."""
    mass = p[kept].sum()
    # What is left out here can't sum to more than 1 - top_p: the nucleus is among the others, and only they are sorted.
    kept = kept[p[kept] >= (1 - top_p) * mass / kept.size]
    kept = kept[np.argsort(-p[kept], kind="stable")]
    return kept[: int(np.searchsorted(np.cumsum(p[kept]) / mass, top_p)) + 1]


def _penalized(logits: FloatArray, seen: set[int], penalty: float) -> FloatArray:
    index = np.fromiter(seen, np.int64, len(seen))
    changed = logits.copy()
    changed[index] = np.where(logits[index] > 0, logits[index] / penalty, logits[index] * penalty)
    return changed


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and bool(np.isfinite(value))
