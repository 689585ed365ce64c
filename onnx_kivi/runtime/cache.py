"""Cache: what a user holds of one cache; everything else is in the backend that owns its handle."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self, SupportsIndex

from ..errors import CacheError
from .backend import Backend
from .cache_file import load_state, save_state


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
        """Tokens held."""
        return self._backend.length(self.handle)

    @property
    def sealed_tokens(self) -> int:
        """Tokens held in quantized form: the least over the slots that quantize."""
        return self._backend.sealed_tokens(self.handle)

    @property
    def nbytes(self) -> int:
        """Bytes held, all parts counted; what forks share counts in full."""
        return self._backend.nbytes(self.handle)

    @property
    def dense_nbytes(self) -> int:
        """Bytes that the same tokens take as float32 keys and values."""
        return self._backend.dense_nbytes(self.handle)

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens. Exact unless it cuts a sealed block, whose kept tokens stay rounded.

        Raises CacheError for what is no length from 0 to self.length.
        """
        self._backend.crop(self.handle, _int64("crop", length))

    def reset(self) -> None:
        """Drop all tokens; the cache stays with its model."""
        self._backend.reset(self.handle)

    def fork(self) -> Cache:
        """An independent copy, which shares the sealed blocks and so costs next to nothing."""
        return Cache(self._backend, self._backend.fork(self.handle))

    def reorder(self, index: Sequence[int]) -> None:
        """Row i becomes the old row index[i] (beam search); rows may be dropped and repeated.

        Raises CacheError for an empty cache or a row that doesn't exist.
        """
        if not isinstance(index, Iterable):
            raise CacheError(f"reorder: expected a list of row numbers, got {index!r}")
        self._backend.reorder(self.handle, [_int64("reorder", i) for i in index])

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


def _int64(where: str, value: object) -> int:
    """An integer that a backend can be told."""
    if isinstance(value, SupportsIndex) and -(1 << 63) <= value.__index__() < 1 << 63:
        return value.__index__()
    raise CacheError(f"{where}: expected an integer of 64 bits, got {value!r}")


def _free(backend: Backend, handle: int) -> None:
    with suppress(CacheError):
        backend.close(handle)
