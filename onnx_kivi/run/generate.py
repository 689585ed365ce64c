"""Generates tokens with a decoder, one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from ..arrays import FloatArray, IntArray
from ..errors import ConfigError
from .sampling import Sampler, Sampling


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
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
) -> Iterator[int]:
    """Token ids that follow the prompt `ids` (1-D, at least one), each as soon as it is known.

    sampling: none = greedy. Stops after max_new_tokens, or at a stop token, which is not yielded. The last token
    yielded is not in the cache yet: begin the next prompt with it. Raises ConfigError for ids or max_new_tokens out of
    range, before the first token.
    """
    prompt = check_prompt(ids, stepper.vocabulary)
    check_max_new_tokens(max_new_tokens)
    return _tokens(stepper, prompt, max_new_tokens, Sampler(sampling or Sampling(), prompt), set(stop_tokens))


def check_max_new_tokens(count: int) -> None:
    """Raise ConfigError unless so many tokens can be asked for."""
    if not isinstance(count, int | np.integer) or count < 0:
        raise ConfigError(f"max_new_tokens: expected an integer >= 0, got {count!r}")


def check_prompt(ids: Sequence[int] | IntArray, vocabulary: int | None) -> IntArray:
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
    stepper: Steps, prompt: IntArray, max_new_tokens: int, sampler: Sampler, stop_tokens: set[int]
) -> Iterator[int]:
    new = prompt
    for _ in range(max_new_tokens):
        token = sampler.choose(stepper.last(new[None])[0])
        if token in stop_tokens:
            return
        yield token
        new = np.array([token], np.int64)
