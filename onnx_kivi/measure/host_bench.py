"""What a node costs beyond the backend's math, in microseconds, on each host that this machine has.

A model of nothing but nodes is run, and the same calls are made directly; all take turns, and figures are medians. Math
is what the direct calls take, less what a call takes that computes next to nothing (one head of one channel).
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from ..errors import ConfigError
from ..graph import parse_model
from ..progress import Progress, silent
from ..run.session import taking_turns
from ..runtime.backend import Backend
from ..runtime.cache import Cache
from ..runtime.hosts import describe, register
from ..runtime.select import get_backend
from ..spec import (
    DOMAIN,
    HANDLE_INPUT,
    KV_CACHE_STEP,
    MIN_IR_VERSION,
    OPSET_VERSION,
    PAST_LENGTH_INPUT,
    QUANTIZED_KV_SDPA,
    SdpaAttributes,
    StepAttributes,
)

NODES = 32
HEADS, KV_HEADS, HEAD_SIZE = 32, 8, 128
WARM_UP = 10
STEP = StepAttributes(model_id="host-bench", layers=NODES)
LAYERS = tuple(SdpaAttributes(slot=slot) for slot in range(NODES))
NOTHING = np.zeros(0, np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class HostCost:
    """us_per_node: microseconds of a node beyond the math of `backend`, one token of 32 heads of 128 channels."""

    host: str
    backend: str
    us_per_node: float


def host_bench(*, turns: int = 300, progress: Progress = silent) -> list[HostCost]:
    """Time `turns` runs on each host, with the backend that is chosen here. Raises ConfigError for turns < 1."""
    if turns < 1:
        raise ConfigError(f"turns: expected an integer >= 1, got {turns}")
    backend = get_backend()
    hosts = [host for host in describe()["hosts"] if host == "python" or backend.name == "native"]
    contenders = {host: _served(host, backend) for host in hosts} | {"math": _direct(backend, HEADS, HEAD_SIZE)}
    if backend.name == "native":  # NumPy is called at the price of any Python call
        contenders["call"] = _direct(backend, 1, 1)
    us = _take_turns(contenders, turns, progress)
    math = us["math"] - us.get("call", 0.0)
    return [HostCost(host, backend.name, us[host] - math) for host in hosts]


def _served(host: str, backend: Backend) -> Callable[[], object]:
    """Runs the nodes, each with the output of the one before as its queries."""
    options = taking_turns()
    options.intra_op_num_threads = 1
    register(options, host=host, backend=backend.name)
    session = ort.InferenceSession(parse_model(_model()), options, providers=["CPUExecutionProvider"])
    query, key = _tokens(HEADS, HEAD_SIZE), _tokens(KV_HEADS, HEAD_SIZE)
    feeds = {"query": query, "key": key, "value": key, "attn_mask": NOTHING, "head_sink": NOTHING}
    feeds[PAST_LENGTH_INPUT] = np.zeros(1, np.int64)
    cache = Cache(backend, backend.new_cache())
    return lambda: session.run(["out"], feeds | {HANDLE_INPUT: np.array([cache.handle])})


def _direct(backend: Backend, heads: int, head_size: int) -> Callable[[], object]:
    """Makes the calls of as many nodes."""
    cache = Cache(backend, backend.new_cache())
    query, key = _tokens(heads, head_size), _tokens(min(heads, KV_HEADS), head_size)

    def call() -> None:
        _, ticket = backend.open_step(cache.handle, 0, STEP)
        for layer in LAYERS:
            backend.attend(ticket, layer, query, key, key, NOTHING, NOTHING)

    return call


def _take_turns(contenders: Mapping[str, Callable[[], object]], turns: int, progress: Progress) -> dict[str, float]:
    """Median microseconds per node of each."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(WARM_UP + turns):
        progress("taking turns", turn / (WARM_UP + turns))
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: float(np.median(seconds[WARM_UP:])) / NODES * 1e6 for name, seconds in taken.items()}


def _model() -> str:
    """The nodes as text: slot i attends with the output of slot i - 1."""
    tensor = f"float[1,{KV_HEADS},1,{HEAD_SIZE}]"
    lines = [
        f"past, ticket = {DOMAIN}.{KV_CACHE_STEP.name} <{_attributes(STEP)}> ({HANDLE_INPUT}, {PAST_LENGTH_INPUT})"
    ]
    names = ["query", *(f"out_{layer.slot}" for layer in LAYERS[:-1]), "out"]
    for layer, query, out in zip(LAYERS, names, names[1:], strict=False):
        inputs = f"{query}, key, value, attn_mask, head_sink, ticket"
        lines.append(f"{out} = {DOMAIN}.{QUANTIZED_KV_SDPA.name} <{_attributes(layer)}> ({inputs})")
    return f"""<ir_version: {MIN_IR_VERSION}, opset_import: ["": 18, "{DOMAIN}": {OPSET_VERSION}]>
    nodes (float[1,{HEADS},1,{HEAD_SIZE}] query, {tensor} key, {tensor} value, float[Z] attn_mask, float[Z] head_sink,
           int64[1] {HANDLE_INPUT}, int64[1] {PAST_LENGTH_INPUT}) => (float[1,{HEADS},1,{HEAD_SIZE}] out)
    {{ {" ".join(lines)} }}"""


def _attributes(attributes: StepAttributes | SdpaAttributes) -> str:
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in attributes.to_wire().items())


def _tokens(heads: int, head_size: int) -> npt.NDArray[Any]:
    return np.random.default_rng(0).standard_normal((1, heads, 1, head_size), np.float32)
