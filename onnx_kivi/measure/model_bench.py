"""Decode speed and cache bytes of whole models by context length, a rewritten one next to its original.

Caches are filled with random keys and values, since only their number matters here; the two models take turns token
by token, and figures are medians.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import ConfigError
from ..progress import Progress, silent
from ..run.session import Session, open_model, taking_turns
from ..run.stepper import Stepper
from ..runtime.backend import CacheState
from ..runtime.cache import Cache
from ..spec import COMMITTED_LENGTH
from ..staging import check_target, staged
from .synthetic import synthetic_stepper

FILL_TOKENS = 4096
WARM_UP = 2


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One context length. Times are medians in ms; the reference's are None without one."""

    context: int
    ms_per_token: float
    reference_ms_per_token: float | None
    cache_bytes: int
    reference_cache_bytes: int | None


def bench(
    model: str | os.PathLike[str],
    *,
    reference: str | os.PathLike[str] | None = None,
    contexts: Sequence[int] = (512, 4096),
    new_tokens: int = 16,
    host: str = "auto",
    backend: str = "auto",
    progress: Progress = silent,
) -> list[Row]:
    """Decode `new_tokens` tokens at each context length. Raises ConfigError for numbers out of range."""
    if not contexts or min(contexts) < 1 or new_tokens < 1:
        raise ConfigError(f"context, new-tokens: expected integers >= 1, got {list(contexts)} and {new_tokens}")
    session = Session(model, taking_turns(), host=host, backend=backend)
    template = _template(session)
    original = open_model(reference, taking_turns()) if reference is not None else None
    rows = []
    for n, context in enumerate(contexts):
        progress(f"decoding at {context} tokens", n / len(contexts))
        with _filled(session, template, context) as cache:
            steppers = [synthetic_stepper(session, cache)]
            if original is not None:
                steppers.append(synthetic_stepper(original, length=context))
            ms = _take_turns(steppers, new_tokens)
            sizes = [stepper.cache_bytes for stepper in steppers]
        rows.append(Row(context, ms[0], ms[1] if original else None, sizes[0], sizes[1] if original else None))
    return rows


def check_plot(path: str | os.PathLike[str]) -> None:
    """Raise ConfigError if `plot` can't draw to this file: before anything is measured for it."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ConfigError("--plot: expected the package matplotlib; pip install 'onnx_kivi[plot]'") from None
    file, kinds = Path(path), FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in kinds:
        raise ConfigError(f"--plot: expected a file that ends in one of {', '.join(kinds)}, got {file}")
    check_target(file)
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(f"--plot: expected a folder that can be written to, got {file.parent}")


def plot(curves: Mapping[str, Sequence[Row]], path: str | os.PathLike[str]) -> None:
    """Draw ms per token and cache bytes over context length, one curve for each name, and the original's.

    Raises ConfigError as `check_plot` does.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in curves.items():
        contexts = [row.context for row in rows]
        left.plot(contexts, [row.ms_per_token for row in rows], marker="o", label=name)
        right.plot(contexts, [row.cache_bytes / 2**20 for row in rows], marker="o", label=name)
    rows = next(iter(curves.values()))
    if all(row.reference_ms_per_token is not None for row in rows):
        contexts = [row.context for row in rows]
        left.plot(contexts, [row.reference_ms_per_token for row in rows], marker="s", color="black", label="original")
        sizes = [(row.reference_cache_bytes or 0) / 2**20 for row in rows]
        right.plot(contexts, sizes, marker="s", color="black", label="original")
    for axes, title in ((left, "ms per token"), (right, "cache, MiB")):
        axes.set(xlabel="tokens of context", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    with staged(Path(path)) as file:
        figure.savefig(file, dpi=120, format=Path(path).suffix.removeprefix("."))


def _template(session: Session) -> CacheState:
    """One token's cache: tells each slot's attributes and shapes."""
    with session.new_cache() as cache:
        synthetic_stepper(session, cache).step(np.ones((1, 1), np.int64))
        return session.backend.export_state(cache.handle)


def _filled(session: Session, template: CacheState, context: int) -> Cache:
    """A cache of `context` random tokens, appended slot by slot without any queries."""
    assert template.step is not None
    backend, random = session.backend, np.random.default_rng(0)
    cache = session.new_cache()
    nothing = np.zeros(0, np.float32)
    for begin in range(0, context, FILL_TOKENS):
        tokens = min(FILL_TOKENS, context - begin)
        _, ticket = backend.open_step(cache.handle, COMMITTED_LENGTH, template.step)
        for slot in template.slots:
            row = slot.rows[0]
            key, value = (
                random.standard_normal((1, row.kv_heads, tokens, size), np.float32) for size in row.head_sizes
            )
            query = np.zeros((1, key.shape[1], 0, key.shape[3]), np.float32)
            backend.attend(ticket, slot.attributes, query, key, value, nothing, nothing)
    return cache


def _take_turns(steppers: Sequence[Stepper], new_tokens: int) -> list[float]:
    """Median ms per token of each."""
    times: list[list[float]] = [[] for _ in steppers]
    for n in range(WARM_UP + new_tokens):
        for stepper, taken in zip(steppers, times, strict=True):
            start = time.perf_counter()
            stepper.step(np.ones((1, 1), np.int64))
            if n >= WARM_UP:
                taken.append((time.perf_counter() - start) * 1e3)
    return [float(np.median(taken)) for taken in times]
