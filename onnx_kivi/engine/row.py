"""One request being served: its cache, its place in the prompt, its tokens."""

from __future__ import annotations

from collections.abc import Callable

from ..arrays import FloatArray, IntArray
from ..run.sampling import Sampler, log_probs
from ..runtime.cache import Cache
from .request import CANCELLED, LENGTH, STOP, Channel, End, Request, Token
from .stops import Stops


class Row:
    """A request between its admission and its end.

    length: tokens that the cache holds. pending: the token to be fed next, once the prompt is in. turn: when it was
    stepped last.
    """

    def __init__(self, request: Request, channel: Channel, cache: Cache, decode: Callable[[list[int]], str]) -> None:
        self.request = request
        self.channel = channel
        self.cache = cache
        self.length = 0
        self.pending = 0
        self.turn = 0
        self._made = 0
        self._sampler = Sampler(request.sampling, request.ids)
        self._stops = Stops(request.stop, decode) if request.stop else None

    @property
    def is_prefilling(self) -> bool:
        """Whether tokens of the prompt are still to be fed."""
        return self.length < len(self.request.ids)

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the answer any more."""
        return self.channel.cancelled.is_set()

    def new_tokens(self, end: int) -> IntArray:
        """The prompt's tokens from those held to `end`."""
        return self.request.ids[self.length : end]

    def take(self, logits: FloatArray) -> End | None:
        """Choose a token from logits (vocabulary,) and give it out; the end if it is one. Raises as Sampler does."""
        chosen = self._sampler.choose(logits)
        if chosen in self.request.stop_tokens:
            return self._ended(STOP)
        count = self.request.logprobs
        token = Token(chosen) if count is None else Token(chosen, *log_probs(logits, chosen, count))
        self.pending = chosen
        self._made += 1
        given, stopped = ([token], False) if self._stops is None else self._stops.push(token)
        for each in given:
            self.channel.items.put(each)
        if stopped:
            return End(STOP)
        return self._ended(LENGTH) if self._made >= self.request.max_new_tokens else None

    def _ended(self, reason: str) -> End:
        for each in self._stops.rest() if self._stops else ():
            self.channel.items.put(each)
        return End(reason)

    def end(self, end: End | None = None) -> None:
        """Free the cache and close the stream."""
        self.cache.close()
        self.channel.items.put(end or End(CANCELLED))
