"""Engine: one model, many requests at once; a thread of its own runs the steps."""

from __future__ import annotations

import atexit
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Condition, Thread
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from ..arrays import IntArray
from ..errors import ConfigError
from ..run.generate import check_max_new_tokens, check_prompt
from ..run.sampling import Sampling
from ..run.session import Session
from ..run.stepper import PREFILL_CHUNK, positive
from .model import BatchedModel
from .request import CANCELLED, ERROR, Channel, End, Request, Stream
from .scheduler import RAGGED
from .serving import Serving

LOG = logging.getLogger(__name__)
OPEN: weakref.WeakSet[Engine] = weakref.WeakSet()


class Decoder(Protocol):
    """What stop strings need: text of token ids."""

    def decode(self, ids: list[int], /) -> str:
        """Text of token ids."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What an engine does, and has done. cache_bytes: what the running rows hold.

    reserved_bytes: what they may come to hold. retained_bytes: what is kept of earlier prompts. seconds: spent in
    `prefill`, `decode` and, of that, `sampling`.
    """

    running: int
    waiting: int
    cache_bytes: int
    reserved_bytes: int
    retained_bytes: int
    prefix_hits: int
    saved_tokens: int
    evictions: int
    counts: dict[str, int]
    seconds: dict[str, float]


class Engine:
    """Serves many requests on one session, as one batch that they join and leave between steps.

    max_batch: rows of a step. cache_bytes: of all caches, those kept of earlier prompts included; a request that does
    not fit waits. prefill_chunk: tokens of a prompt that are fed at once, between steps of the others; what is kept of
    earlier prompts is cut at its multiples. tokenizer: gives the text that stop strings are looked for in, and, if it
    has them, stop_tokens. max_length: the most tokens that the model was made for, if that is known.

    `mode` says which rows the model takes in one run, `reason` why not all: `ragged`, `equal lengths` or `one by one`.
    Close it, or use it in a `with` block. Raises ConfigError for numbers out of range, and UnsupportedModelError for a
    model that takes more than tokens, or carries a cache itself.
    """

    def __init__(
        self,
        session: Session,
        max_batch: int = 8,
        cache_bytes: int = 2**30,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        tokenizer: Decoder | None = None,
        max_length: int | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("cache_bytes", cache_bytes), ("max_length", max_length or 1)):
            positive(name, value)
        self._model = BatchedModel(session)
        self.mode, self.reason = self._model.mode, self._model.reason
        if self.mode != RAGGED:
            LOG.warning("rows run %s: %s", self.mode, self.reason)
        self._tokenizer, self._max_length, self._cache_bytes = tokenizer, max_length, cache_bytes
        self._serving = Serving(
            self._model,
            max_batch=max_batch,
            cache_bytes=cache_bytes,
            chunk=positive("prefill_chunk", prefill_chunk),
            decode=tokenizer.decode if tokenizer else _no_text,
        )
        self._changed = Condition()
        self._closed: str | None = None
        self._thread = Thread(target=self._serve, name="onnx_kivi engine", daemon=True)
        self._thread.start()
        OPEN.add(self)

    def submit(
        self,
        ids: Sequence[int] | IntArray,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop_tokens: Sequence[int] | None = None,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
    ) -> Stream:
        """Ask for tokens after the prompt `ids`; iterating over what this returns gives them as they come.

        The options up to seed: see `Sampling`. stop_tokens: end the answer and are not given; none said = the
        tokenizer's. stop: a string, or some, at which the answer ends; tokens that have part in it are not given.
        logprobs: each token comes with its log-probability and those of so many of the likeliest, in stream.logprobs.
        Raises ConfigError for what is out of range, does not fit in cache_bytes or max_length, or an engine that is
        closed. A model that fails on this request raises from the stream.
        """
        sampling = Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed)
        check_max_new_tokens(max_new_tokens)
        prompt = check_prompt(ids, self._model.vocabulary)
        ends = getattr(self._tokenizer, "stop_tokens", ()) if stop_tokens is None else tuple(stop_tokens)
        if not all(isinstance(each, int | np.integer) for each in ends):
            raise ConfigError(f"stop_tokens: expected integers, got {stop_tokens!r}")
        strings = self._stop_strings(stop)
        if logprobs is not None and (not isinstance(logprobs, int | np.integer) or logprobs < 0):
            raise ConfigError(f"logprobs: expected an integer >= 0, or None, got {logprobs!r}")
        request = Request(prompt, int(max_new_tokens), sampling, frozenset(map(int, ends)), strings, logprobs)
        self._check_fits(request)
        channel = Channel()
        with self._changed:
            if self._closed is not None:
                raise ConfigError(f"engine: expected one that is open, got one that {self._closed}")
            self._serving.waiting.append((request, channel))
            self._changed.notify()
        return Stream(channel)

    def stats(self) -> Stats:
        """What it does now, and has done."""
        serving, prefixes = self._serving, self._serving.prefixes
        with self._changed:
            return Stats(
                running=len(serving.scheduler.running),
                waiting=len(serving.waiting),
                cache_bytes=serving.held,
                reserved_bytes=serving.reserved,
                retained_bytes=prefixes.nbytes,
                prefix_hits=prefixes.hits,
                saved_tokens=prefixes.saved_tokens,
                evictions=prefixes.evictions,
                counts=dict(serving.counts),
                seconds=dict(serving.seconds),
            )

    def close(self) -> None:
        """End all requests as cancelled, free all caches, and wait for the step that runs."""
        with self._changed:
            self._closed = self._closed or "was closed"
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self) -> None:
        end = End(CANCELLED)
        try:
            while self._closed is None:
                if not self._serving.turn():
                    with self._changed:
                        while not self._serving.waiting and self._closed is None:
                            self._changed.wait()
        except Exception as error:
            LOG.exception("the engine stops")
            end = End(ERROR, error)
        with self._changed:
            self._closed = self._closed or "stopped by an error of its own"
            self._serving.stop(end)

    def _stop_strings(self, stop: Any) -> tuple[str, ...]:
        strings = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(each, str) and each for each in strings):
            raise ConfigError(f"stop: expected strings of at least one character, got {stop!r}")
        if strings and self._tokenizer is None:
            raise ConfigError("stop: expected an engine with a tokenizer; give Engine(tokenizer=...)")
        return strings

    def _check_fits(self, request: Request) -> None:
        most, size = request.most_tokens, self._model.sizes.whole(request.most_tokens)
        if self._max_length is not None and most > self._max_length:
            raise ConfigError(
                f"max_new_tokens: expected at most {self._max_length} tokens with the prompt, got {most}; the model "
                "was made for no more"
            )
        if size > self._cache_bytes:
            raise ConfigError(
                f"max_new_tokens: expected a cache within cache_bytes = {self._cache_bytes}, got {most} tokens with "
                f"the prompt, which take {size}; shorten the request or give the engine more"
            )


@atexit.register
def _close_all() -> None:
    """End the steps before the interpreter does: onnxruntime must not run on while it goes."""
    for engine in [*OPEN]:
        engine.close()


def _no_text(_: list[int]) -> str:
    return ""
