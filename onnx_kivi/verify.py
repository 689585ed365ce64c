"""Is a rewritten model still the original? Runs both on the same tokens: prefill, a chunk, then single tokens.

At 32 bits the logits must agree to float rounding, which tells graph errors from quantization error; so a quantized
model is verified twice: its 32-bit sibling (rewritten from the original into a temporary file) to rounding, and the
model itself by KL divergence and top-1 agreement, past the point where every slot holds sealed blocks.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from .config import KiviConfig
from .decoder import Decoder
from .errors import ConfigError, UnsupportedModelError
from .evaluate import log_softmax
from .graph import load, save
from .inspector import Report, inspect
from .progress import Progress, silent
from .rewriter import rewrite
from .session import Session, open_model, quiet_options
from .spec import DENSE_BITS, SdpaAttributes

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

PAD = 3
CHUNK = 8
DENSE_PROMPT = 24
VOCABULARY = 100
# Rounding: ten times what onnxruntime's own optimizations change, within (floor, ceiling) of the logits' range.
ROUNDING = {"float": (1e-4, 1e-3), "float16": (5e-3, 2e-2), "bfloat16": (2e-2, 1e-1)}
# Quantization: (mean KL in nats, top-1 agreement) that a sound cache of so many bits keeps even on random weights,
# whose logits are nearly tied; trained models stay a hundred times below (README, "Quality").
LIMITS = {8: (1e-3, 0.95), 4: (0.1, 0.8), 2: (1.5, 0.3), DENSE_BITS: (1e-6, 0.99)}


@dataclasses.dataclass(frozen=True, slots=True)
class Verification:
    """Outcome of `verify`.

    max_rel_diff: largest difference of logits at 32 bits over the original's range of logits. mean_kl (nats) and
    top1_agreement: of the model as it is, over the tokens after the prefill. sealed_tokens: the least over its slots.
    tokens: how many were compared. ok is False exactly when `reason` says why.
    """

    max_rel_diff: float
    tolerance: float
    mean_kl: float
    top1_agreement: float
    sealed_tokens: int
    tokens: int
    reason: str

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.reason

    def to_dict(self) -> dict[str, Any]:
        """JSON object of the outcome."""
        return dataclasses.asdict(self) | {"ok": self.ok}


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

    def replay(self, decoder: Decoder) -> FloatArray:
        """Logits (B, T, vocabulary) of all tokens. A chunk that the model refuses is fed token by token."""
        decoder.restart()
        out: list[FloatArray] = []
        begin = 0
        for end in self.ends:
            try:
                out.append(decoder.step(self.ids[:, begin:end], self.mask[:, :end]))
            except Exception:
                if begin == 0 or end - begin == 1:
                    raise
                out += [decoder.step(self.ids[:, t : t + 1], self.mask[:, : t + 1]) for t in range(begin, end)]
            begin = end
        return np.concatenate(out, axis=1)


def verify(
    original: str | os.PathLike[str],
    rewritten: str | os.PathLike[str],
    *,
    prompt: int | None = None,
    steps: int = 4,
    batch: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
    progress: Progress = silent,
) -> Verification:
    """Compare a rewritten model with its original on random tokens, padded (row 0, on the left) and unpadded.

    prompt: tokens of the prefill (default: enough to seal several blocks in every slot, as far as the original
    runs). steps: single tokens at the end. batch: rows. tolerance: of the 32-bit comparison (default: calibrated by
    the original against itself unoptimized). Raises UnsupportedModelError if either can't be run, ConfigError.
    """
    for name, value in (("prompt", prompt), ("steps", steps), ("batch", batch)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected an integer >= 1, got {value}")
    report = inspect(original)
    slots = _slots(rewritten)
    quantized = [a for a in slots if min(a.k_bits, a.v_bits) < DENSE_BITS]
    progress("verify: running the original", 0.0)
    reference = _Reference(original, report, _prompts(slots, prompt), steps, batch, seed)
    floor, ceiling = ROUNDING[report.element]
    limit = tolerance if tolerance is not None else float(np.clip(10 * reference.noise(), floor, ceiling))
    if not quantized:
        progress("verify: running the rewritten model", 0.6)
        scores = reference.compare(rewritten)
        return _judge(scores, scores, limit, None)
    with tempfile.TemporaryDirectory(dir=Path(rewritten).parent, prefix=".kivi-verify-") as folder:
        progress("verify: rewriting and running its 32-bit sibling", 0.4)
        sibling = Path(folder) / "model.onnx"
        save(rewrite(load(original), _dense(slots[0]), partial=bool(report.misses))[0], sibling)
        exact = reference.compare(sibling)
    progress("verify: running the rewritten model", 0.7)
    return _judge(exact, reference.compare(rewritten), limit, min(min(a.k_bits, a.v_bits) for a in quantized))


@dataclasses.dataclass(frozen=True, slots=True)
class _Scores:
    max_rel_diff: float
    mean_kl: float
    top1_agreement: float
    sealed_tokens: int
    tokens: int


class _Reference:
    """The original's logits on the tokens that it can be run on, and what others make of the same tokens."""

    def __init__(
        self, path: str | os.PathLike[str], report: Report, prompts: list[int], steps: int, batch: int, seed: int
    ) -> None:
        self._path = path
        self._pairs = {
            name: output
            for site in report.sites
            for name, output in zip(site.cache_inputs, site.cache_outputs, strict=True)
        }
        self._head_sizes = {
            name: size
            for site in report.sites
            for name, size in zip(site.cache_inputs, (site.k_head_size, site.v_head_size), strict=False)
            if size
        }
        session = open_model(path)
        pads_right = any(site.family == "gqa" for site in report.sites)
        has_mask = any(i.name == "attention_mask" for i in session.get_inputs())
        vocabulary = _vocabulary(session)
        self._runs: list[tuple[Tokens, FloatArray]] = []
        failure: Exception | None = None
        for rows, pad in dict.fromkeys([(batch, 0 if pads_right or not has_mask else PAD), (1, 0)]):
            for prompt in prompts:
                tokens = Tokens.random(rows, pad, (prompt, CHUNK, *[1] * steps), vocabulary, seed)
                try:
                    self._runs.append((tokens, tokens.replay(self._decoder(session))))
                except UnsupportedModelError:
                    raise
                except Exception as error:
                    failure = error
                else:
                    break
        if not self._runs:
            raise UnsupportedModelError(
                f"{path}: expected an original that runs {min(prompts) + CHUNK + steps} tokens, so that the cache is "
                f"really used, got: {' '.join(str(failure).split())}; choose smaller blocks, residual or --prompt, "
                "or --no-verify"
            )

    def noise(self) -> float:
        """Largest relative difference to the original with onnxruntime's graph optimizations off."""
        options = quiet_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = open_model(self._path, options)
        return max(_compare(t, y, t.replay(self._decoder(session)), 0).max_rel_diff for t, y in self._runs)

    def compare(self, path: str | os.PathLike[str]) -> _Scores:
        """Scores of a rewritten model, over all runs."""
        session = Session(path)
        scores = []
        for tokens, expected in self._runs:
            with session.new_cache() as cache:
                decoder = Decoder(session, cache, pairs=self._pairs)
                scores.append(_compare(tokens, expected, tokens.replay(decoder), cache.sealed_tokens))
        weights = [s.tokens for s in scores]
        return _Scores(
            max(s.max_rel_diff for s in scores),
            float(np.average([s.mean_kl for s in scores], weights=weights)),
            float(np.average([s.top1_agreement for s in scores], weights=weights)),
            min(s.sealed_tokens for s in scores),
            sum(weights),
        )

    def _decoder(self, session: ort.InferenceSession) -> Decoder:
        return Decoder(session, pairs=self._pairs, head_sizes=self._head_sizes)


def _compare(tokens: Tokens, expected: FloatArray, got: FloatArray, sealed_tokens: int) -> _Scores:
    """Real tokens only: rows of padding are nobody's. KL and top-1 count what comes after the prefill."""
    real = tokens.mask.astype(bool)
    x, y = expected[real], got[real]
    difference = float(np.abs(x - y).max() / max(float(np.ptp(x)), 1e-9))
    late = real.copy()
    late[:, : tokens.ends[0]] = False
    p, q = log_softmax(expected[late]), log_softmax(got[late])
    return _Scores(
        difference if np.isfinite(difference) else float("inf"),
        float((np.exp(p) * (p - q)).sum(-1).mean()),
        float((p.argmax(-1) == q.argmax(-1)).mean()),
        sealed_tokens,
        int(late.sum()),
    )


def _judge(exact: _Scores, actual: _Scores, tolerance: float, bits: int | None) -> Verification:
    reasons = []
    if not exact.max_rel_diff <= tolerance:
        reasons.append(f"at 32 bits logits differ by {exact.max_rel_diff:.1e} of their range, over {tolerance:.1e}")
    if bits is not None:
        kl, top1 = LIMITS[bits]
        if actual.sealed_tokens <= 0:
            reasons.append("no token was quantized in some slot")
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
        reason="; ".join(reasons),
    )


def _vocabulary(session: ort.InferenceSession) -> int:
    last = next((o.shape[-1] for o in session.get_outputs() if o.name == "logits"), None)
    return last if isinstance(last, int) else VOCABULARY


def _slots(rewritten: str | os.PathLike[str]) -> list[SdpaAttributes]:
    """The nodes' attributes, learned by running one token."""
    session = Session(rewritten)
    with session.new_cache() as cache:
        one = np.ones((1, 1), np.int64)
        Decoder(session, cache).step(one, one)
        return [slot.attributes for slot in cache.export_state().slots]


def _prompts(slots: list[SdpaAttributes], prompt: int | None) -> list[int]:
    """Prefill lengths to try, longest first; all but a dense model's last ones seal blocks in every slot."""
    if prompt is not None:
        return [prompt]
    dense = max(a.sink_length + a.residual_length for a in slots)
    block = max(a.block_tokens for a in slots)
    lengths = [dense + blocks * block for blocks in (4, 2, 1)]
    return lengths if any(min(a.k_bits, a.v_bits) < DENSE_BITS for a in slots) else [*lengths, DENSE_PROMPT, PAD + 5]


def _dense(attributes: SdpaAttributes) -> KiviConfig:
    return KiviConfig(
        k_bits=DENSE_BITS,
        v_bits=DENSE_BITS,
        block_tokens=attributes.block_tokens,
        residual_length=attributes.residual_length,
        sink_length=attributes.sink_length,
    )
