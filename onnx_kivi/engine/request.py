"""What is asked of the engine, and the stream in which its answer comes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event

from ..arrays import IntArray
from ..run.sampling import Sampling

STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
"""Why a stream ends: a stop token or string, max_new_tokens, because nobody wants it, or by an exception."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt, ids (S,), and what is wanted of it. logprobs: alternatives that each token comes with; None = none."""

    ids: IntArray
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    @property
    def most_tokens(self) -> int:
        """The most that its cache may come to hold."""
        return len(self.ids) + self.max_new_tokens


@dataclass(frozen=True, slots=True)
class Token:
    """A token, its log-probability and the likeliest tokens with theirs, where these were asked for."""

    id: int
    log_prob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class End:
    """The last thing in a stream: why it ends, or the error that ended it."""

    reason: str
    error: Exception | None = None


class Channel:
    """Between the engine's thread and a stream's reader: tokens one way, the wish to stop the other.

    The engine never waits for a reader. What is not read waits here, at most max_new_tokens.
    """

    def __init__(self) -> None:
        self.items: SimpleQueue[Token | End] = SimpleQueue()
        self.cancelled = Event()
        self.cached_tokens = 0


@dataclass(slots=True, weakref_slot=True, eq=False)
class Stream:
    """An answer: iterating gives token ids as they come, and raises the error that ended it.

    reason is None until it has ended, then one of the words above. logprobs has a Token for each id given, if they were
    asked for. A stream that is dropped, or cancelled, ends its request, and frees its cache, before the next step.
    """

    _channel: Channel
    reason: str | None = None
    logprobs: list[Token] = field(default_factory=list)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._channel.cancelled.set).atexit = False

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that an earlier one had computed; known with the first token."""
        return self._channel.cached_tokens

    def cancel(self) -> None:
        """End the request before the next step; tokens already made can still be read."""
        self._channel.cancelled.set()

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self.reason is not None:
            raise StopIteration
        item = self._channel.items.get()
        if isinstance(item, Token):
            if item.log_prob is not None:
                self.logprobs.append(item)
            return item.id
        self.reason = item.reason
        if item.error is not None:
            raise item.error
        raise StopIteration
