"""The engine's work, step by step: admits requests, runs what the scheduler chooses, gives out tokens.

All of it happens on one thread but for `waiting`, to which others add.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence

import numpy as np

from ..arrays import FloatArray, IntArray
from .model import BatchedModel
from .prefixes import Conversation, PrefixCache
from .request import CANCELLED, ERROR, LENGTH, Channel, End, Request
from .row import Row
from .scheduler import Scheduler, Step, chunk_end

Waiting = tuple[Request, Channel]


class Serving:
    """Rows that run, requests that wait, and what is kept of earlier prompts: together at most `cache_bytes` of caches.

    seconds and counts: of the parts of the work, by name.
    """

    def __init__(
        self,
        model: BatchedModel,
        *,
        max_batch: int,
        cache_bytes: int,
        chunk: int,
        decode: Callable[[list[int]], str],
    ) -> None:
        self.waiting: deque[Waiting] = deque()
        self.prefixes = PrefixCache(model.sizes, chunk)
        self.scheduler: Scheduler[Row] = Scheduler(max_batch, model.mode)
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()
        self._model, self._decode_text = model, decode
        self._cache_bytes, self._chunk = cache_bytes, chunk
        self._conversations: dict[Row, Conversation] = {}

    @property
    def reserved(self) -> int:
        """Bytes that the rows that run may come to take."""
        return sum(self._model.sizes.whole(row.request.most_tokens) for row in self.scheduler.running)

    @property
    def held(self) -> int:
        """Bytes that the rows that run hold."""
        return sum(self._model.sizes.whole(row.length) for row in self.scheduler.running)

    def turn(self) -> bool:
        """One step for those who want one; whether anybody did."""
        self._forget()
        while self.waiting and self._admit():
            pass
        step = self.scheduler.next_step()
        if step is None:
            return False
        began = time.perf_counter()
        name = "prefill" if step.is_prefill else "decode"
        (self._prefill if step.is_prefill else self._decode)(step)
        self.counts[f"{name} steps"] += 1
        self.seconds[name] += time.perf_counter() - began
        return True

    def stop(self, end: End) -> None:
        """End everything."""
        for row in [*self.scheduler.running]:
            self._finish(row, end)
        while self.waiting:
            self.waiting.popleft()[1].items.put(end)
        self.prefixes.shrink(0)

    def _forget(self) -> None:
        """Drop what nobody waits for any more."""
        for row in [row for row in self.scheduler.running if row.is_cancelled]:
            self._finish(row, End(CANCELLED))
        for each in [each for each in list(self.waiting) if each[1].cancelled.is_set()]:
            self.waiting.remove(each)
            each[1].items.put(End(CANCELLED))

    def _admit(self) -> bool:
        """Let the first that waits run, if it fits; nobody overtakes it."""
        if not self.scheduler.has_room:
            return False
        request, channel = self.waiting[0]
        needed = self.reserved + self._model.sizes.whole(request.most_tokens)
        if needed > self._cache_bytes:
            return False
        self.waiting.popleft()
        if request.max_new_tokens == 0:
            channel.items.put(End(LENGTH))
            return True
        self.prefixes.shrink(self._cache_bytes - needed)
        row = Row(request, channel, self._model.new_cache(), self._decode_text)
        self._conversations[row] = Conversation(request.ids)
        self.scheduler.running.append(row)
        return True

    def _prefill(self, step: Step[Row]) -> None:
        """A chunk of one prompt."""
        (row,) = step.rows
        if row.length == 0:
            self._start(row)
        end = chunk_end(row.length, len(row.request.ids), self._chunk)
        logits = self._logits(step.rows, row.new_tokens(end)[None])
        if logits is None:
            return
        self.counts["prompt tokens"] += end - row.length
        row.length = end
        conversation = self._conversations[row]
        if self.prefixes.wants(conversation, end):
            self.prefixes.keep(conversation, end, row.cache, self._cache_bytes - self.reserved)
        if not row.is_prefilling:
            self._take(row, logits[0])

    def _start(self, row: Row) -> None:
        """Begin with what an earlier prompt has computed: only now, as the prompts before it are in."""
        found = self.prefixes.find(row.request.ids)
        if found is not None:
            row.cache.close()
            row.cache, row.length = found
            row.channel.cached_tokens = row.length

    def _decode(self, step: Step[Row]) -> None:
        """A token for each row. Where that fails, each row by itself, to find out whose failure it is."""
        pending = np.array([[row.pending] for row in step.rows], np.int64)
        logits = self._logits(step.rows, pending)
        if logits is None:
            for row in step.rows if len(step.rows) > 1 else ():
                self._decode(Step((row,), is_prefill=False))
            return
        began = time.perf_counter()
        for row, its in zip(step.rows, logits, strict=True):
            row.length += 1
            self._take(row, its)
        self.counts["new tokens"] += len(step.rows)
        self.seconds["sampling"] += time.perf_counter() - began

    def _logits(self, rows: Sequence[Row], ids: IntArray) -> FloatArray | None:
        """What the model makes of new tokens (B, S); None if it fails, and then a row that ran alone ends."""
        try:
            return self._model.run([row.cache for row in rows], [row.length for row in rows], ids)
        except Exception as error:
            if len(rows) == 1:
                self._finish(rows[0], End(ERROR, error))
            return None

    def _take(self, row: Row, logits: FloatArray) -> None:
        try:
            end = row.take(logits)
        except Exception as error:
            end = End(ERROR, error)
        if end is not None:
            self._finish(row, end)

    def _finish(self, row: Row, end: End) -> None:
        self.scheduler.running.remove(row)
        del self._conversations[row]
        row.end(end)
