"""Cache: what a user holds of one cache; everything else is in the backend that owns its handle."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, SupportsIndex, TypeVar

from ..errors import CacheError
from ..spec_types import MAX_SIZE
from .backend import Backend
from .cache_file import load_state, save_state

T = TypeVar("T")


class Cache:
    """The keys and values of one batch of sequences, for the model that first uses it.

    Made by Session.new_cache, Session.load_cache, or fork. Any thread may use it; two runs at a time may not
    (`run_lock`). It is freed by close, by the end of a `with` block, or with its last reference. Every use of a
    closed cache raises CacheError.
    """

    def __init__(self, backend: Backend, handle: int) -> None:
        self.handle = handle
        self.run_lock = threading.Lock()
        self._backend = backend
        self._free = weakref.finalize(self, _free, backend, handle)
        self._free.atexit = False

    @classmethod
    def load(cls, path: str | os.PathLike[str], backend: Backend) -> Self:
        """The cache in a file that `save` wrote. Raises CacheError if the file is not one, or is damaged."""
        return cls(backend, backend.import_state(load_state(path)))

    @property
    def length(self) -> int:
        """Tokens held, by the row that holds most."""
        return self._backend.length(self.handle)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each row holds; () for an empty cache."""
        return self._backend.lengths(self.handle)

    @property
    def sealed_tokens(self) -> int:
        """Tokens held in quantized form: the least over the slots that quantize."""
        return self._backend.sealed_tokens(self.handle)

    @property
    def nbytes(self) -> int:
        """Bytes held, all parts counted; what forks share counts in full."""
        return self._backend.nbytes(self.handle)

    @property
    def backend(self) -> str:
        """Name of the backend that holds the cache."""
        return self._backend.name

    @property
    def shared_nbytes(self) -> int:
        """Of `nbytes`, the bytes that another cache, or another row of this one, holds too."""
        return self._backend.shared_nbytes(self.handle)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same tokens take as float32 keys and values."""
        return self._backend.dense_nbytes(self.handle)

    def crop(self, length: int | Iterable[int]) -> None:
        """Keep the first `length` tokens of each row (of shorter rows all), or of row b the first length[b].

        Exact unless it cuts a sealed block, whose kept tokens stay rounded. Raises CacheError for what is no length
        from 0 to self.length, and for one whose window shows tokens that were freed.
        """
        if isinstance(length, Iterable):
            self._backend.crop_rows(self.handle, [_int64("crop", each) for each in length])
        else:
            self._backend.crop(self.handle, _int64("crop", length))

    def reset(self) -> None:
        """Drop all tokens; the cache stays with its model."""
        self._backend.reset(self.handle)

    def fork(self) -> Cache:
        """An independent copy, which shares the sealed blocks and so costs next to nothing."""
        return Cache(self._backend, self._backend.fork(self.handle))

    def select(self, rows: Iterable[int]) -> Cache:
        """An independent copy of these rows, in this order; rows may be repeated. Raises CacheError as `reorder`."""
        return self._gather([(self.handle, _int64("select", row)) for row in _each("select", rows)])

    def repeat(self, times: int) -> Cache:
        """An independent copy with each row `times` times in a row, as for beams. Raises CacheError."""
        if not 1 <= _int64("repeat", times) <= MAX_SIZE:
            raise CacheError(f"repeat: expected 1 to {MAX_SIZE} times, got {times}")
        return self.select([row for row in range(len(self.lengths)) for _ in range(times)])

    def split(self) -> list[Cache]:
        """An independent copy of each row, as a cache of its own."""
        return [self.select([row]) for row in range(len(self.lengths))]

    @staticmethod
    def join(caches: Iterable[Cache]) -> Cache:
        """An independent copy of the rows of several caches, in order, as one cache; lengths may differ.

        Raises CacheError for no caches, an empty one, or caches of different models or backends.
        """
        caches = [*_each("join", caches, "caches")]
        if not caches:
            raise CacheError("join: expected at least one cache, got none")
        if strangers := [other for other in caches if not isinstance(other, Cache)]:
            raise CacheError(f"join: expected caches, got {strangers[0]!r}")
        others = {cache._backend.name for cache in caches}
        if len(others) > 1:
            raise CacheError(f"join: expected caches of one backend, got {', '.join(sorted(others))}")
        rows = [(cache.handle, row) for cache in caches for row in range(max(len(cache.lengths), 1))]
        return caches[0]._gather(rows)

    def _gather(self, rows: Sequence[tuple[int, int]]) -> Cache:
        return Cache(self._backend, self._backend.gather(rows))

    def reorder(self, index: Iterable[int]) -> None:
        """Row i becomes the old row index[i] (beam search); rows may be dropped and repeated.

        Raises CacheError for an empty cache or a row that doesn't exist.
        """
        self._backend.reorder(self.handle, [_int64("reorder", i) for i in _each("reorder", index)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one file, under its final name only once complete. Raises CacheError if that fails."""
        save_state(path, self._backend.export_state(self.handle))

    def close(self) -> None:
        """Free the memory. Raises CacheError if the cache is closed already."""
        self._free.detach()
        self._backend.close(self.handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._free.alive:
            self.close()

    def __repr__(self) -> str:
        try:
            return (
                f"<Cache {self.handle} on {self._backend.name}: {self.length} tokens, {self.sealed_tokens} sealed, "
                f"{self.nbytes} bytes ({self.dense_nbytes} as float32)>"
            )
        except CacheError:
            return f"<Cache {self.handle} on {self._backend.name}: closed>"


def _each(where: str, values: Iterable[T], what: str = "row numbers") -> Iterable[T]:
    """What was given, if it is a list at all."""
    if isinstance(values, Iterable):
        return values
    raise CacheError(f"{where}: expected a list of {what}, got {values!r}")


def _int64(where: str, value: object) -> int:
    """An integer that a backend can be told."""
    with suppress(TypeError):  # of an array that holds more than one number
        if isinstance(value, SupportsIndex) and -(1 << 63) <= value.__index__() < 1 << 63:
            return value.__index__()
    raise CacheError(f"{where}: expected an integer of 64 bits, got {value!r}")


def _free(backend: Backend, handle: int) -> None:
    with suppress(CacheError):
        backend.close(handle)
