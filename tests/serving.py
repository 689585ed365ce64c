"""Serves requests step by step on the test's own thread, without the engine's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import onnx_kivi as kivi
from onnx_kivi.engine.model import BatchedModel
from onnx_kivi.engine.request import Channel, End, Request, Token
from onnx_kivi.engine.serving import Serving
from onnx_kivi.run.sampling import Sampling

Ids = npt.NDArray[np.int64]
CHUNK = 16
PROMPTS = np.random.default_rng(11).integers(0, 256, (8, 200))


def serve(session: kivi.Session, *, max_batch: int = 8, cache_bytes: int = 1 << 30, chunk: int = CHUNK) -> Serving:
    """What an engine has, with no thread."""
    model = BatchedModel(session)
    return Serving(model, max_batch=max_batch, cache_bytes=cache_bytes, chunk=chunk, decode=str)


def ask(serving: Serving, ids: Ids, count: int, **sampling: Any) -> Channel:
    """Put a request behind those that wait."""
    channel = Channel()
    serving.waiting.append((Request(ids, count, Sampling(**sampling)), channel))
    return channel


def finish(serving: Serving, turns: int = 10000) -> None:
    """Run until nothing is left to do."""
    for _ in range(turns):
        if not serving.turn():
            return
    raise AssertionError(f"not done after {turns} steps")


def answer(channel: Channel) -> tuple[list[int], End | None]:
    """The tokens that came, and the end if it did."""
    tokens: list[int] = []
    while not channel.items.empty():
        item = channel.items.get()
        if isinstance(item, End):
            return tokens, item
        assert isinstance(item, Token)
        tokens.append(item.id)
    return tokens, None


def alone(session: kivi.Session, ids: Ids, count: int, **options: Any) -> list[int]:
    """What a lone run gives."""
    return list(session.generate(ids, max_new_tokens=count, prefill_chunk=CHUNK, **options))


def watch(session: kivi.Session, monkeypatch: Any, change: Callable[[Ids, Any], Any]) -> list[tuple[int, int]]:
    """Have `change(ids, results)` see each run before its results are used; gives the shapes of what is fed."""
    fed: list[tuple[int, int]] = []
    run = session.run

    def watched(names: Sequence[str] | None, feeds: dict[str, Any], **more: Any) -> Any:
        ids = feeds["input_ids"]
        fed.append(ids.shape)
        return change(ids, lambda: run(names, feeds, **more))

    monkeypatch.setattr(session, "run", watched)
    return fed
