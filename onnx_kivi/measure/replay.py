"""Runs an original, and others, on the same random tokens: prefill, a chunk, single tokens; and compares the logits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

import numpy as np
import onnxruntime as ort

from ..arrays import FloatArray, IntArray
from ..errors import UnsupportedModelError
from ..rewrite.report import Report
from ..run.session import Session, open_model, quiet_options
from ..run.signature import Signature
from ..run.stepper import Stepper
from ..runtime.cache import Cache
from .perplexity import log_softmax
from .synthetic import ENCODER_TOKENS, synthetic_stepper

FATAL = 4
PAD = 3
CHUNK = 8
VOCABULARY = 100


@dataclasses.dataclass(frozen=True, slots=True)
class Tokens:
    """What both models are fed: ids and mask (B, T), and the ends of the steps."""

    ids: IntArray
    mask: IntArray
    ends: tuple[int, ...]

    @classmethod
    def random(cls, batch: int, pad: int, lengths: Iterable[int], vocabulary: int, seed: int) -> Tokens:
        """Random tokens; row 0 begins with `pad` tokens of padding."""
        ends = tuple(int(e) for e in np.cumsum(list(lengths)))
        ids = np.random.default_rng(seed).integers(min(3, vocabulary - 1), vocabulary, (batch, ends[-1]))
        mask = np.ones_like(ids)
        mask[0, :pad] = 0
        return cls(ids, mask, ends)

    def replay(self, stepper: Stepper) -> FloatArray:
        """Logits (B, T, vocabulary) of all tokens. A chunk that the model refuses is fed token by token."""
        stepper.restart()
        out: list[FloatArray] = []
        begin = 0
        for end in self.ends:
            try:
                out.append(stepper.step(self.ids[:, begin:end], self.mask[:, :end]))
            except Exception:
                if begin == 0 or end - begin == 1:
                    raise
                out += [stepper.step(self.ids[:, t : t + 1], self.mask[:, : t + 1]) for t in range(begin, end)]
            begin = end
        return np.concatenate(out, axis=1)


@dataclasses.dataclass(frozen=True, slots=True)
class Divergence:
    """How far one model's logits are from another's; mean_kl in nats, over `tokens` tokens after the prefill."""

    max_rel_diff: float
    prefill_rel_diff: float
    mean_kl: float
    top1_agreement: float
    sealed_tokens: int
    tokens: int


class Reference:
    """The original's logits on the tokens that it can be run on, and what others make of the same tokens."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        report: Report,
        prompts: list[int],
        steps: int,
        batch: int,
        seed: int,
        encoder_tokens: int = ENCODER_TOKENS,
    ) -> None:
        self._path = path
        self._facts = report.cache_facts
        self._encoder_tokens = encoder_tokens
        session = open_model(path, _silent_options())
        pads_right = any(site.pads_right for site in report.sites)
        has_mask = any(i.name == "attention_mask" for i in session.get_inputs())
        vocabulary = Signature(session).vocabulary or VOCABULARY
        self._runs: list[tuple[Tokens, FloatArray]] = []
        failure: Exception | None = None
        for rows, pad in dict.fromkeys([(batch, 0 if pads_right or not has_mask else PAD), (1, 0)]):
            for prompt in prompts:
                tokens = Tokens.random(rows, pad, (prompt, CHUNK, *[1] * steps), vocabulary, seed)
                try:
                    self._runs.append((tokens, tokens.replay(self._stepper(session, tokens))))
                except UnsupportedModelError:
                    raise
                except Exception as error:
                    failure = error
                else:
                    break
        if not self._runs:
            raise UnsupportedModelError(
                f"{path}: expected an original that runs {min(prompts) + CHUNK + steps} tokens, so that the cache is "
                f"really used, got: {' '.join(str(failure).split())}; choose smaller blocks or residual, "
                "or --no-verify"
            )

    def noise(self) -> float:
        """Largest relative difference to the original with onnxruntime's graph optimizations off."""
        options = _silent_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = open_model(self._path, options)
        return max(_compare(t, y, t.replay(self._stepper(session, t)), 0).max_rel_diff for t, y in self._runs)

    def compare(self, path: str | os.PathLike[str]) -> Divergence:
        """Divergence of a rewritten model, over all runs."""
        session = Session(path)
        scores = []
        for tokens, expected in self._runs:
            with session.new_cache() as cache:
                stepper = self._stepper(session, tokens, cache)
                scores.append(_compare(tokens, expected, tokens.replay(stepper), cache.sealed_tokens))
        weights = [s.tokens for s in scores]
        return Divergence(
            max(s.max_rel_diff for s in scores),
            max(s.prefill_rel_diff for s in scores),
            float(np.average([s.mean_kl for s in scores], weights=weights)),
            float(np.average([s.top1_agreement for s in scores], weights=weights)),
            min(s.sealed_tokens for s in scores),
            sum(weights),
        )

    def _stepper(self, session: ort.InferenceSession | Session, tokens: Tokens, cache: Cache | None = None) -> Stepper:
        return synthetic_stepper(
            session, cache, batch=len(tokens.ids), facts=self._facts, encoder_tokens=self._encoder_tokens
        )


def _silent_options() -> ort.SessionOptions:
    """Options for originals, which may refuse a chunk or a length: that is dealt with here, and no error to log."""
    options = quiet_options()
    options.log_severity_level = FATAL
    return options


def _compare(tokens: Tokens, expected: FloatArray, got: FloatArray, sealed_tokens: int) -> Divergence:
    """Real tokens only: rows of padding are nobody's. KL and top-1 count what comes after the prefill."""
    real = tokens.mask.astype(bool)
    late = real.copy()
    late[:, : tokens.ends[0]] = False
    p, q = log_softmax(expected[late]), log_softmax(got[late])
    return Divergence(
        _rel_diff(expected[real], got[real]),
        _rel_diff(expected[real & ~late], got[real & ~late]),
        float((np.exp(p) * (p - q)).sum(-1).mean()),
        float((p.argmax(-1) == q.argmax(-1)).mean()),
        sealed_tokens,
        int(late.sum()),
    )


def _rel_diff(x: FloatArray, y: FloatArray) -> float:
    """Largest difference over the range of x; infinite where y is NaN."""
    difference = float(np.abs(x - y).max() / max(float(np.ptp(x)), 1e-9))
    return difference if np.isfinite(difference) else float("inf")
