"""An original's logits on the tokens that it can be run on, and how far others are from them on the same tokens.

One session is open at a time, and what is kept of it is the logits compared: a model's weights are held once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnxruntime as ort

from ..arrays import FloatArray
from ..errors import UnsupportedModelError
from ..rewrite.report import Report
from ..run.session import Session, open_model, quiet_options
from ..run.signature import Signature
from ..run.stepper import Stepper
from ..runtime.cache import Cache
from .replay import Divergence, Tick, Tokens, divergence
from .synthetic import ENCODER_TOKENS, synthetic_stepper

FATAL = 4
PAD = 3
VOCABULARY = 100


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens to be made: rows, the tokens of each step, and of an encoder. padded: row 0 begins with padding."""

    rows: int
    padded: bool
    lengths: tuple[int, ...]
    encoder_tokens: int = ENCODER_TOKENS

    @property
    def work(self) -> int:
        """Tokens of all rows."""
        return self.rows * sum(self.lengths)


Choice = Sequence[Run]
"""Runs of which the first is taken that the original can do."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How sessions of a few steps are opened. lean: to cost little; else as users open them.

    A lean session does without a second layout of its weights, which would double them in memory and takes longer to
    make than the steps, unless they are `packed`: without their layout MatMulNBits unpacks all of them in each step. It
    optimizes little; nothing if `plain`, for folded constants of a model that makes floats of its weights fill memory.
    """

    lean: bool
    packed: bool = False
    plain: bool = False

    def options(self) -> ort.SessionOptions:
        """Options as onnxruntime takes them."""
        options = quiet_options()
        if self.lean:
            level = ort.GraphOptimizationLevel
            options.graph_optimization_level = level.ORT_DISABLE_ALL if self.plain else level.ORT_ENABLE_BASIC
            options.enable_cpu_mem_arena = False
            options.add_session_config_entry("session.disable_prepacking", str(int(not self.packed)))
        return options


class Reference:
    """The original at `path`, run once on what it can of each choice.

    Raises UnsupportedModelError if it can't do any run of a choice that is `needed`, by default of all.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        report: Report,
        choices: Sequence[Choice],
        seed: int,
        tick: Tick,
        *,
        opening: Opening,
        needed: int | None = None,
    ) -> None:
        self._path, self._facts, self._tick, self._opening = path, report.cache_facts, tick, opening
        session = open_model(path, self._options())
        self._padded = not any(site.pads_right for site in report.sites) and any(
            i.name == "attention_mask" for i in session.get_inputs()
        )
        self._vocabulary, self._seed = Signature(session).vocabulary or VOCABULARY, seed
        self._runs: list[tuple[Tokens, FloatArray]] = []
        failure: Exception | None = None
        for choice in choices:
            failure = self._first(session, choice) or failure
        if len(self._runs) < (len(choices) if needed is None else needed):
            shortest = min(sum(run.lengths) for choice in choices for run in choice)
            raise UnsupportedModelError(
                f"{path}: expected an original that runs {shortest} tokens, so that the cache is really used, got: "
                f"{' '.join(str(failure).split())}; choose smaller blocks or residual, or --no-verify"
            )

    @property
    def longest(self) -> int:
        """Tokens of the longest run."""
        return max(tokens.ends[-1] for tokens, _ in self._runs)

    def original(self, path: str | os.PathLike[str] | None = None, *, optimized: bool = True) -> list[Divergence]:
        """How far the original is from itself, or from another at `path`, on each run."""
        options = self._options()
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = open_model(path or self._path, options)
        return [divergence(t, y, t.replay(self._stepper(session, t), self._tick), 0) for t, y in self._runs]

    def rewritten(self, path: str | os.PathLike[str]) -> list[Divergence]:
        """How far a rewritten model is from the original, on each run."""
        session = Session(path, self._opening.options())
        return [*self._scores(session)]

    def _first(self, session: ort.InferenceSession, choice: Choice) -> Exception | None:
        """Do the first run that the original can do; else say why it can't do the last."""
        failure: Exception | None = None
        for run in choice:
            pad = PAD if run.padded and self._padded else 0
            tokens = Tokens.random(run.rows, pad, run.lengths, self._vocabulary, self._seed, run.encoder_tokens)
            try:
                self._runs.append((tokens, tokens.replay(self._stepper(session, tokens), self._tick)))
            except UnsupportedModelError:
                raise
            except Exception as error:
                failure = error
            else:
                return None
        return failure

    def _scores(self, session: Session) -> Iterator[Divergence]:
        for tokens, expected in self._runs:
            with session.new_cache() as cache:
                got = tokens.replay(self._stepper(session, tokens, cache), self._tick)
                yield divergence(tokens, expected, got, cache.sealed_tokens)

    def _stepper(self, session: ort.InferenceSession | Session, tokens: Tokens, cache: Cache | None = None) -> Stepper:
        return synthetic_stepper(
            session, cache, batch=len(tokens.ids), facts=self._facts, encoder_tokens=tokens.encoder_tokens
        )

    def _options(self) -> ort.SessionOptions:
        """Options for originals, which may refuse a chunk or a length: that is dealt with here, and no error to log."""
        options = self._opening.options()
        options.log_severity_level = FATAL
        return options
