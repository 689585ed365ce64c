"""One decode step of attention: this package's backends against onnxruntime's own paths and the memory's limit.

All contenders take turns within one run and rotate over enough layers that their bytes exceed four times the
last-level cache; figures are medians. The streaming-read limit is measured on a buffer of as many bytes. A turn is two
steps, on different layers, of which the second is timed: what the contender before leaves behind (on some machines a
core is slow for half a millisecond after the large copies of `concat`) is not charged to the next.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import FloatArray
from ..errors import BackendUnavailableError, ConfigError
from ..progress import Progress, silent
from ..runtime.backend import Backend
from ..runtime.hosts import describe, limit_threads
from ..runtime.select import get_backend
from ..spec import COMMITTED_LENGTH, DENSE_BITS, SdpaAttributes, StepAttributes
from .contenders import AttentionSize, Contender, concat, group_query_attention, layers_for

LAST_LEVEL_CACHE = 32 << 20
CACHE_FACTOR = 4
BUDGET_SECONDS = 20.0
WARM_UP = 2
MIN_TURNS = 7
MAX_TURNS = 200


@dataclasses.dataclass(frozen=True, slots=True)
class KernelBench:
    """rows: name, median ms of one step, and GB of cache read per second. ratios: how many times faster than each;
    `stream` is our bytes per second over the streaming-read limit's."""

    rows: list[dict[str, Any]]
    ratios: dict[str, float]
    isa: str
    threads: int


class BackendContender:
    """A backend's whole op (attend, append, seal), on as many layers as slots of one cache."""

    def __init__(self, backend: Backend, shape: AttentionSize, bits: int, total_bytes: int) -> None:
        self.name = f"onnx_kivi_{backend.name}"
        layers = layers_for(shape.dense_bytes * bits // DENSE_BITS, total_bytes)
        self._backend, self._handle = backend, backend.new_cache()
        self._step = StepAttributes(model_id="kernel-bench", layers=layers)
        self._layers = [
            SdpaAttributes(
                slot=slot, k_bits=bits, v_bits=bits, residual_length=0, sink_length=0, scale=shape.head_size**-0.5
            )
            for slot in range(layers)
        ]
        random = np.random.default_rng(0)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        self._token = [random.standard_normal((1, h, 1, shape.head_size), np.float32) for h in heads]
        _, self._ticket = backend.open_step(self._handle, COMMITTED_LENGTH, self._step)
        for layer in self._layers:
            tokens = (1, shape.kv_heads, shape.context - 1, shape.head_size)
            key, value = (random.standard_normal(tokens, np.float32) for _ in "kv")
            self._attend(layer, np.zeros((1, shape.heads, 0, shape.head_size), np.float32), key, value)
        self.layer_bytes = backend.nbytes(self._handle) // layers

    def step(self, turn: int) -> None:
        """See Contender."""
        if turn % len(self._layers) == 0:
            _, self._ticket = self._backend.open_step(self._handle, COMMITTED_LENGTH, self._step)
        self._attend(self._layers[turn % len(self._layers)], *self._token)

    def close(self) -> None:
        """Free the cache."""
        self._backend.close(self._handle)

    def _attend(self, layer: SdpaAttributes, query: FloatArray, key: FloatArray, value: FloatArray) -> None:
        nothing = np.zeros(0, np.float32)
        self._backend.attend(self._ticket, layer, query, key, value, nothing, nothing)


class StreamReader:
    """Reads as many bytes as one of our layers holds, and does nothing else: the memory's limit."""

    def __init__(self, layer_bytes: int, total_bytes: int, threads: int) -> None:
        self.name = "stream"
        self.layer_bytes = layer_bytes
        words = layer_bytes // 8
        self._layers = np.ones((layers_for(layer_bytes, total_bytes), threads, words // threads), np.uint64)
        self._pool = ThreadPoolExecutor(threads)

    def step(self, turn: int) -> None:
        """See Contender."""
        shares = self._layers[turn % len(self._layers)]
        if len(shares) == 1:
            np.bitwise_or.reduce(shares[0])
        else:
            list(self._pool.map(np.bitwise_or.reduce, shares))


def kernel_bench(
    *,
    heads: int = 32,
    kv_heads: int = 8,
    head_size: int = 128,
    context: int = 16384,
    bits: int = 8,
    threads: int = 1,
    backends: Sequence[str] = ("native", "numpy"),
    progress: Progress = silent,
) -> KernelBench:
    """Time one decode step of all contenders. Ratios are those of the first of `backends` that is available.

    Raises ConfigError for numbers out of range.
    """
    if min(heads, kv_heads, head_size, threads) < 1 or context < 2 or heads % kv_heads:
        raise ConfigError(
            "heads, kv-heads, head-size, context, threads: expected positive integers, context at least 2 and heads "
            f"a multiple of kv-heads, got {heads}, {kv_heads}, {head_size}, {context}, {threads}"
        )
    shape = AttentionSize(heads, kv_heads, head_size, context)
    total = CACHE_FACTOR * last_level_cache_bytes()
    limit_threads(threads)
    progress("filling caches", 0.0)
    ours = [BackendContender(b, shape, bits, total) for b in _available(backends)]
    theirs: list[Contender] = [concat(shape, total, threads), group_query_attention(shape, total, threads, 32)]
    theirs += [group_query_attention(shape, total, threads, b) for b in (8, 4) if head_size % 2 == 0]
    stream = StreamReader(ours[0].layer_bytes, total, threads)
    ms = _interleave([*ours, *theirs, stream], progress)
    for contender in ours:
        contender.close()
    rows = [
        {"name": c.name, "ms": ms[c.name], "gb_per_s": c.layer_bytes / ms[c.name] / 1e6}
        for c in (*ours, *theirs, stream)
    ]
    best = ms[ours[0].name]
    ratios = {c.name: ms[c.name] / best for c in theirs} | {"stream": ms[stream.name] / best}
    return KernelBench(rows, ratios, str(describe()["isa"]), threads)


def last_level_cache_bytes() -> int:
    """Of this machine, as Linux tells it; 32 MiB where nothing does."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [int(text[:-1]) << 10 for path in caches if (text := path.read_text().strip()).endswith("K")]
    return max(sizes, default=LAST_LEVEL_CACHE)


def _available(names: Sequence[str]) -> list[Backend]:
    found = []
    for name in names:
        try:
            found.append(get_backend(name))
        except BackendUnavailableError:
            continue
    return found


def _interleave(contenders: Sequence[Contender], progress: Progress) -> dict[str, float]:
    """Median ms of each one's second step in a row, all taking turns, within a budget of seconds."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    began = time.perf_counter()
    turn = 0
    while turn < WARM_UP + MIN_TURNS or (turn < MAX_TURNS and time.perf_counter() - began < BUDGET_SECONDS):
        for contender in contenders:
            contender.step(2 * turn)
            start = time.perf_counter()
            contender.step(2 * turn + 1)
            if turn >= WARM_UP:
                times[contender.name].append((time.perf_counter() - start) * 1e3)
        turn += 1
        progress("taking turns", turn / MAX_TURNS)
    return {name: float(np.median(ms)) for name, ms in times.items()}
