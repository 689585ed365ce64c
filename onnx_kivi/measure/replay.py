"""Random tokens that models are run on, a prefill, a chunk, single tokens; and how far apart their logits are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from ..arrays import FloatArray, IntArray
from ..run.stepper import Stepper
from .perplexity import log_softmax
from .synthetic import ENCODER_TOKENS

KEPT = 16

Tick = Callable[[int], None]
"""Told of every step how many tokens, of all rows, were run."""


def unheard(tokens: int) -> None:
    """A Tick that nobody listens to."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What models are fed: ids and mask (B, T), the ends of the steps, and how many tokens an encoder has."""

    ids: IntArray
    mask: IntArray
    ends: tuple[int, ...]
    encoder_tokens: int = ENCODER_TOKENS

    @classmethod
    def random(
        cls,
        batch: int,
        pad: int,
        lengths: Iterable[int],
        vocabulary: int,
        seed: int,
        encoder_tokens: int = ENCODER_TOKENS,
    ) -> Tokens:
        """Random tokens; row 0 begins with `pad` tokens of padding."""
        ends = tuple(int(e) for e in np.cumsum(list(lengths)))
        ids = np.random.default_rng(seed).integers(min(3, vocabulary - 1), vocabulary, (batch, ends[-1]))
        mask = np.ones_like(ids)
        mask[0, :pad] = 0
        return cls(ids, mask, ends, encoder_tokens)

    @cached_property
    def kept(self) -> IntArray:
        """The tokens whose logits are compared: the first and last ones of each step, for all would fill the memory."""
        begins = (0, *self.ends[:-1])
        edges = [
            {*range(b, min(b + KEPT, e)), *range(max(b, e - KEPT), e)} for b, e in zip(begins, self.ends, strict=True)
        ]
        return np.array(sorted(set().union(*edges)))

    def replay(self, stepper: Stepper, tick: Tick = unheard) -> FloatArray:
        """Logits (B, kept, vocabulary). A chunk that the model refuses is fed token by token."""
        stepper.restart()
        out: list[FloatArray] = []
        begin = 0
        for end in self.ends:
            try:
                out.append(self._step(stepper, begin, end))
            except Exception:
                if begin == 0 or end - begin == 1:
                    raise
                out += [self._step(stepper, t, t + 1) for t in range(begin, end)]
            tick(len(self.ids) * (end - begin))
            begin = end
        return np.concatenate(out, axis=1)

    def _step(self, stepper: Stepper, begin: int, end: int) -> FloatArray:
        logits = stepper.step(self.ids[:, begin:end], self.mask[:, :end])
        mine = self.kept[(self.kept >= begin) & (self.kept < end)] - begin
        return logits if len(mine) == end - begin else logits[:, mine]


@dataclasses.dataclass(frozen=True, slots=True)
class Divergence:
    """How far one model's logits are from another's; mean_kl in nats, over `tokens` tokens after the prefill."""

    max_rel_diff: float
    prefill_rel_diff: float
    mean_kl: float
    top1_agreement: float
    sealed_tokens: int
    tokens: int


def divergence(tokens: Tokens, expected: FloatArray, got: FloatArray, sealed_tokens: int) -> Divergence:
    """Real tokens only: rows of padding are nobody's. KL and top-1 count what comes after the prefill."""
    real = tokens.mask[:, tokens.kept].astype(bool)
    late = real & (tokens.kept >= tokens.ends[0])
    p, q = log_softmax(expected[late]), log_softmax(got[late])
    return Divergence(
        _rel_diff(expected[real], got[real]),
        _rel_diff(expected[real & ~late], got[real & ~late]),
        float((np.exp(p) * (p - q)).sum(-1).mean()),
        float((p.argmax(-1) == q.argmax(-1)).mean()),
        sealed_tokens,
        int(late.sum()),
    )


def joined(scores: Sequence[Divergence]) -> Divergence:
    """What is to say of several runs of one model."""
    weights = [s.tokens for s in scores]
    return Divergence(
        max(s.max_rel_diff for s in scores),
        max(s.prefill_rel_diff for s in scores),
        float(np.average([s.mean_kl for s in scores], weights=weights)),
        float(np.average([s.top1_agreement for s in scores], weights=weights)),
        min(s.sealed_tokens for s in scores),
        sum(weights),
    )


def _rel_diff(x: FloatArray, y: FloatArray) -> float:
    """Largest difference over the range of x; infinite where y is NaN."""
    difference = float(np.abs(x - y).max() / max(float(np.ptp(x)), 1e-9))
    return difference if np.isfinite(difference) else float("inf")
