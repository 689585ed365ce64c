"""Generates tokens with a decoder: greedily, or by sampling with temperature and nucleus (top-p) truncation.

Nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ..arrays import FloatArray, IntArray
from ..errors import ConfigError


class Steps(Protocol):
    """What generation needs of a Stepper."""

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows, where it says."""

    def last(self, ids: IntArray, /) -> FloatArray:
        """Logits (1, vocabulary) of the last of the new tokens `ids` (1, S)."""


def generate(
    stepper: Steps,
    ids: Sequence[int] | IntArray,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_tokens: Sequence[int] = (),
) -> Iterator[int]:
    """Token ids that follow the prompt `ids` (1-D, at least one), each as soon as it is known.

    temperature 0 is greedy. Stops after max_new_tokens, or at a stop token, which is not yielded. The last
    token yielded is not in the cache yet: begin the next prompt with it. Raises ConfigError for ids or options out of
    range, before the first token.
    """
    prompt = _prompt(ids, stepper.vocabulary)
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens: expected an integer >= 0, got {max_new_tokens}")
    if not (np.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature: expected a number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p: expected 0 < top_p <= 1, got {top_p}")
    check_seed(seed)
    return _tokens(stepper, prompt, max_new_tokens, temperature, top_p, np.random.default_rng(seed), set(stop_tokens))


def check_seed(seed: int | None) -> None:
    """Raise ConfigError unless random numbers can start from `seed`."""
    if seed is not None and (not isinstance(seed, int | np.integer) or seed < 0):
        raise ConfigError(f"seed: expected an integer >= 0, got {seed!r}")


def sample(logits: FloatArray, temperature: float, top_p: float, random: np.random.Generator) -> int:
    """One token id from logits (vocabulary,)."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    return int(random.choice(kept, p=p[kept] / p[kept].sum()))


def _prompt(ids: Sequence[int] | IntArray, vocabulary: int | None) -> IntArray:
    """One prompt's ids (S,). Raises ConfigError."""
    prompt = np.asarray(ids)
    if prompt.ndim == 2 and prompt.shape[0] == 1:
        prompt = prompt[0]
    if prompt.ndim != 1 or prompt.size == 0:
        raise ConfigError(f"ids: expected one prompt of at least one token, got shape {np.shape(ids)}")
    expected = "integers >= 0" if vocabulary is None else f"integers from 0 to {vocabulary - 1}"
    if not np.issubdtype(prompt.dtype, np.integer):
        raise ConfigError(f"ids: expected {expected}, got {prompt.dtype}")
    outside = prompt[(prompt < 0) | (prompt >= (vocabulary or np.inf))]
    if outside.size:
        raise ConfigError(f"ids: expected {expected}, got {outside[0]}")
    return prompt.astype(np.int64)


def _tokens(
    stepper: Steps,
    prompt: IntArray,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    random: np.random.Generator,
    stop_tokens: set[int],
) -> Iterator[int]:
    new = prompt
    for _ in range(max_new_tokens):
        token = sample(stepper.last(new[None])[0], temperature, top_p, random)
        if token in stop_tokens:
            return
        yield token
        new = np.array([token], np.int64)
