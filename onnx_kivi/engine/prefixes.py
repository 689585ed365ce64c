"""Caches of earlier prompts, kept so that a prompt which begins alike need not compute that part again.

Of a prompt some snapshots are kept, at ends of chunks: the last, and others at distances that double. So a prompt that
leaves an earlier one recomputes about as much as they differ by. A cache that is cropped would be another one than that
of the shorter prompt (more of it would be sealed); a snapshot is the same, byte for byte.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from ..arrays import IntArray
from ..runtime.cache import Cache
from .budget import CacheSizes


@dataclass(eq=False, slots=True)
class Conversation:
    """A prompt and snapshots of its cache, by tokens held."""

    ids: IntArray
    snapshots: dict[int, Cache] = field(default_factory=dict)

    def nbytes(self, sizes: CacheSizes) -> int:
        """Bytes held: sealed blocks once, and what is not sealed for each snapshot."""
        longest = max(self.snapshots, default=0)
        return sizes.sealed(longest) + sum(map(sizes.tail, self.snapshots))

    def common(self, ids: IntArray) -> int:
        """Tokens with which both prompts begin."""
        count = min(len(ids), len(self.ids))
        different = np.flatnonzero(self.ids[:count] != ids[:count])
        return int(different[0]) if different.size else count


class PrefixCache:
    """The conversations that are kept, the least recently used first. hits, saved_tokens: what they were good for."""

    def __init__(self, sizes: CacheSizes, chunk: int) -> None:
        self.hits = self.saved_tokens = self.evictions = self.nbytes = 0
        self._sizes, self._chunk = sizes, chunk
        self._kept: OrderedDict[int, Conversation] = OrderedDict()

    def find(self, ids: IntArray) -> tuple[Cache, int] | None:
        """A copy of the longest cache that is of the beginning of `ids`, but not of all, and its tokens."""
        found: tuple[int, Conversation] | None = None
        for conversation in self._kept.values():
            most = min(conversation.common(ids), len(ids) - 1)
            length = max((n for n in conversation.snapshots if n <= most), default=0)
            if length > (found[0] if found else 0):
                found = length, conversation
        if found is None:
            return None
        length, conversation = found
        self._kept.move_to_end(id(conversation))
        self.hits += 1
        self.saved_tokens += length
        return conversation.snapshots[length].fork(), length

    def wants(self, conversation: Conversation, length: int) -> bool:
        """Whether a snapshot at `length` tokens is one that is kept."""
        behind = (len(conversation.ids) - 1) // self._chunk - length // self._chunk + 1
        return length > 0 and length % self._chunk == 0 and behind > 0 and behind & (behind - 1) == 0

    def keep(self, conversation: Conversation, length: int, cache: Cache, room: int) -> None:
        """Keep a copy of a cache of `length` tokens, and of all that is kept no more than `room` bytes."""
        before = conversation.nbytes(self._sizes) if id(conversation) in self._kept else 0
        if id(conversation) not in self._kept:
            conversation.snapshots.clear()
        conversation.snapshots[length] = cache.fork()
        self._kept[id(conversation)] = conversation
        self._kept.move_to_end(id(conversation))
        self.nbytes += conversation.nbytes(self._sizes) - before
        self.shrink(room)

    def shrink(self, room: int) -> None:
        """Drop the least recently used until no more than `room` bytes are left."""
        while self._kept and self.nbytes > room:
            _, conversation = self._kept.popitem(last=False)
            self.nbytes -= conversation.nbytes(self._sizes)
            self.evictions += 1
            for cache in conversation.snapshots.values():
                cache.close()
            conversation.snapshots.clear()
