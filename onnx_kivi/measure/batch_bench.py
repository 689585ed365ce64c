"""Tokens per second of many streams through the engine, and what the original gives one stream after another.

Every stream has a random prompt of its own, so that nothing is shared. Each prompt is first asked for by itself, for
one token: that is the time to the first token. Then all are asked for at once; they start from what was kept of them,
and so generate together almost at once. Figures are medians over rounds of one token for each stream.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort

from ..arrays import IntArray
from ..engine.engine import Engine
from ..engine.request import Stream
from ..errors import ConfigError
from ..progress import Progress, silent
from ..run.session import Session, open_model, taking_turns
from ..run.signature import Signature
from .reference import VOCABULARY
from .synthetic import synthetic_stepper

BOUNDLESS = 1 << 50
WARM_UP = 2
JOINING_STEPS = 4


@dataclass(frozen=True, slots=True)
class Row:
    """One number of streams at one context length. reference_tokens_per_s: of one stream alone; None without one.

    first_token_ms: of a prompt that nobody else's runs beside. cache_bytes: of all streams together.
    """

    streams: int
    context: int
    tokens_per_s: float
    first_token_ms: float
    cache_bytes: int
    reference_tokens_per_s: float | None


def batch_bench(
    model: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    streams: Sequence[int] = (1, 8),
    contexts: Sequence[int] = (2048,),
    new_tokens: int = 16,
    progress: Progress = silent,
) -> list[Row]:
    """Measure each number of streams at each context length. Raises ConfigError for numbers out of range."""
    if not streams or not contexts or min(*streams, *contexts, new_tokens) < 1:
        raise ConfigError(
            f"streams, context, new-tokens: expected integers >= 1, got {list(streams)}, {list(contexts)} and "
            f"{new_tokens}"
        )
    session = Session(model, taking_turns())
    original = open_model(reference, taking_turns()) if reference is not None else None
    cases = [(count, context) for context in contexts for count in streams]
    rows = []
    for n, (count, context) in enumerate(cases):
        progress(f"{count} streams at {context} tokens", n / len(cases))
        rate, first, nbytes = _served(session, count, context, new_tokens)
        theirs = _lone_rate(original, context, new_tokens) if original is not None else None
        rows.append(Row(count, context, rate, first, nbytes, theirs))
    return rows


def _served(session: Session, count: int, context: int, new_tokens: int) -> tuple[float, float, int]:
    """Tokens per second, ms to a first token, and bytes of all caches."""
    vocabulary = Signature(session).vocabulary or VOCABULARY
    prompts = np.random.default_rng(0).integers(0, vocabulary, (count, context))
    with Engine(session, count, BOUNDLESS) as engine:
        first = [_timed_first(engine, ids) for ids in prompts]
        most = new_tokens + WARM_UP + JOINING_STEPS * count
        streams = [engine.submit(ids, max_new_tokens=most) for ids in prompts]
        times = _rounds(streams, new_tokens)
        nbytes = engine.stats().cache_bytes
    return count / float(np.median(times)), float(np.median(first)), nbytes


def _timed_first(engine: Engine, ids: IntArray) -> float:
    """ms until a prompt has its first token."""
    began = time.perf_counter()
    next(engine.submit(ids, max_new_tokens=1))
    return (time.perf_counter() - began) * 1e3


def _rounds(streams: Sequence[Stream], new_tokens: int) -> list[float]:
    """Seconds of each round in which every stream gives a token, once all of them do."""
    times = []
    for n in range(WARM_UP + new_tokens):
        began = time.perf_counter()
        for stream in streams:
            next(stream)
        if n >= WARM_UP:
            times.append(time.perf_counter() - began)
    return times


def _lone_rate(original: ort.InferenceSession, context: int, new_tokens: int) -> float:
    """Tokens per second of the original, which carries random keys and values of `context` tokens."""
    stepper = synthetic_stepper(original, length=context)
    times = []
    for n in range(WARM_UP + new_tokens):
        began = time.perf_counter()
        stepper.step(np.ones((1, 1), np.int64))
        if n >= WARM_UP:
            times.append(time.perf_counter() - began)
    return 1 / float(np.median(times))
