"""Session: an InferenceSession of a rewritten model that owns its caches and raises the op's real errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import onnxruntime as ort

from ..arrays import Array, IntArray
from ..errors import CacheError, UnsupportedModelError
from ..own_nodes import read_own_nodes
from ..paths import model_path
from ..runtime.cache import Cache
from ..runtime.hosts import choose, register, take_error
from ..spec import DOMAIN, HANDLE_INPUT, NEW_LENGTH_INPUT, PAST_LENGTH_INPUT, STAMP_CHANNELS, STORED_TOKENS
from .generate import generate
from .sampling import Sampling
from .signature import ELEMENTS
from .stepper import PREFILL_CHUNK, Stepper

ERROR = 3
NO_STAMPS = np.zeros((1, 1, 0, STAMP_CHANNELS), np.float32)


class NotRewrittenError(UnsupportedModelError):
    """The model loads, but has no QuantizedKvSdpa nodes."""


class Session:
    """Runs a rewritten model. Every `run` appends to a cache: the session's own one, or the one given.

    model: path of the file, of a folder that holds model.onnx, or the model's bytes. host: who serves the nodes,
    `python` (onnxruntime-extensions), `native` (the compiled custom-op library) or `auto` (native where it is built).
    backend: `native`, `numpy` or `auto`; the native host implies the native backend. Raises UnsupportedModelError for a
    file that is missing, unreadable or not rewritten, BackendUnavailableError for a host or backend that isn't there.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        sess_options: ort.SessionOptions | None = None,
        providers: Sequence[Any] | None = None,
        *,
        host: str = "auto",
        backend: str = "auto",
    ) -> None:
        options = sess_options if sess_options is not None else quiet_options()
        nodes = read_own_nodes(model if isinstance(model, bytes) else model_path(model))
        if nodes is None:
            raise NotRewrittenError(
                f"{_name(model)}: expected a rewritten model, with nodes of {DOMAIN}, got one without; run onnx-kivi "
                "rewrite on it first"
            )
        self.nodes = nodes
        self.host, self.backend = choose(host, backend)
        register(options, host=self.host, backend=self.backend.name)
        self._session = open_model(model, options, providers)
        overridable = {i.name for i in self._session.get_overridable_initializers()}
        if not {HANDLE_INPUT, PAST_LENGTH_INPUT} <= overridable:
            raise NotRewrittenError(
                f"{_name(model)}: expected a rewritten model, with inputs {HANDLE_INPUT} and {PAST_LENGTH_INPUT}, "
                "got one without; run onnx-kivi rewrite on it first"
            )
        self.takes_rows = NEW_LENGTH_INPUT in overridable
        self._stored = [i for i in self.get_inputs() if STORED_TOKENS in i.shape]
        self._outputs = [o.name for o in self.get_outputs()]
        self._ghosts = dict.fromkeys(nodes.past, NO_STAMPS)
        self.cache = self.new_cache()

    def get_inputs(self) -> list[ort.NodeArg]:
        """The inputs that a caller feeds; not the past of ghost I/O, for which a cache stands."""
        return [i for i in self._session.get_inputs() if i.name not in self.nodes.past]

    def get_outputs(self) -> list[ort.NodeArg]:
        """The outputs that a run gives; not the present of ghost I/O."""
        return [o for o in self._session.get_outputs() if o.name not in self.nodes.present]

    def new_cache(self) -> Cache:
        """An empty cache for this model; close it, or let it go out of scope, to free it."""
        return Cache(self.backend, self.backend.new_cache())

    def load_cache(self, path: str | os.PathLike[str]) -> Cache:
        """A cache from a file that Cache.save wrote. A file of another model is refused when it is first run."""
        return Cache.load(path, self.backend)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: ort.RunOptions | None = None,
        *,
        cache: Cache | Sequence[Cache] | None = None,
    ) -> list[Any]:
        """As InferenceSession.run; the new tokens are appended to `cache` (default: this session's own).

        cache: several caches of one row each make a batch, row b of which is cache[b], whatever each of them holds: a
        left-padded batch whose padding is not stored. attention_mask is then (B, T), right-aligned, with T the most
        tokens that any of them holds and those fed; feeding new_length = (B) says how many of a row's tokens, its last
        ones, are new. Feeding past_length = n, or (B), first drops what lies beyond n tokens. An encoder's keys and
        values that the model stores (`rewrite --cross`) are fed once, and again when there are others; a run without
        them attends to those held. Raises CacheError (or another KiviError) for whatever the op refused, after which
        every cache is as it was before the run.
        """
        for name, fed in input_feed.items():
            if fed is None:  # onnxruntime lets it through to the op, where onnxruntime-extensions aborts the process
                raise CacheError(f"run: {name}: expected an array, got None")
        caches = self._caches(cache)
        with _locked(caches):
            handles = [c.handle for c in caches]
            feeds = {**self._ghosts, **input_feed, **self._held(input_feed), HANDLE_INPUT: np.array(handles, np.int64)}
            results, failure = None, None
            try:
                results = self._session.run(output_names or self._outputs, feeds, run_options)
            except Exception as error:
                failure = error
            if (refusal := take_error(self.host, handles, failure)) is not None:
                raise refusal from failure
            if failure is not None:
                for each in caches:
                    each.crop(each.length)  # ends the step: an open one passes for that of a model that lacks nodes
                raise failure
            return list(results or ())

    def _caches(self, cache: Cache | Sequence[Cache] | None) -> list[Cache]:
        if cache is None:
            return [self.cache]
        caches = [cache] if isinstance(cache, Cache) else list(cache)
        for row, each in enumerate(caches):
            if not isinstance(each, Cache):
                raise CacheError(f"run: expected a cache or a list of caches, got {each!r} as number {row}")
            if each.backend != self.backend.name:
                raise CacheError(
                    f"row {row}: cache {each.handle}: expected one of backend {self.backend.name}, as this session, "
                    f"got one of {each.backend}; save it there and load it here"
                )
        if not caches:
            raise CacheError("run: expected a cache, or at least one in a list, got none")
        if len(caches) > 1 and not self.takes_rows:
            raise CacheError(
                f"run: expected one cache, got {len(caches)}: the model was rewritten by version 1 of the op, which "
                "knows no others; rewrite the original again"
            )
        return caches

    def generate(
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
        stop_tokens: Sequence[int] = (),
        prefill_chunk: int = PREFILL_CHUNK,
        cache: Cache | None = None,
        inputs: Mapping[str, Array] | None = None,
    ) -> Iterator[int]:
        """Generate after the prompt `ids`, one token id at a time, greedily or by sampling (temperature > 0).

        temperature to seed: see `Sampling`. prefill_chunk: tokens of the prompt that are fed at once; what is sealed of
        one chunk the next ones see rounded. inputs: what the model takes beside tokens, by input name: an encoder's
        keys, values and mask. States that the model carries itself start at zero. Starts a new conversation on a fresh
        cache, unless `cache` is given, which is then continued. Stops after max_new_tokens or at (and without) a stop
        token. Raises ConfigError for ids, options or names of inputs out of range, and with the first token
        UnsupportedModelError for an input that is still missing, such as embeddings.
        """
        return generate(
            Stepper(
                self, self.new_cache() if cache is None else cache, given=inputs or {}, prefill_chunk=prefill_chunk
            ),
            ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, top_k, min_p, repetition_penalty, seed),
            stop_tokens=stop_tokens,
        )

    def _held(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Arrays of no tokens for the inputs that slots store, if none of them is fed. Raises CacheError."""
        absent = [i for i in self._stored if i.name not in feeds]
        if not absent:
            return {}
        if len(absent) < len(self._stored):
            raise CacheError(
                f"run: {absent[0].name}: expected all of an encoder's keys and values, or none, got "
                f"{len(self._stored) - len(absent)} of {len(self._stored)}"
            )
        return {i.name: np.zeros([self._size(i, size, feeds) for size in i.shape], ELEMENTS[i.type]) for i in absent}

    def _size(self, stored: ort.NodeArg, size: int | str | None, feeds: Mapping[str, Any]) -> int:
        """The size of an axis of an input that stores nothing: 0 tokens, and others as what is fed has them."""
        if isinstance(size, int) or size == STORED_TOKENS:
            return size if isinstance(size, int) else 0
        for i in self._session.get_inputs():
            if i.name in feeds and size is not None and size in i.shape:
                return int(np.shape(feeds[i.name])[i.shape.index(size)])
        raise CacheError(
            f"run: {stored.name}: expected a shape that the other inputs tell, got {stored.shape}; feed an array of "
            "0 tokens"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_session", "_stored", "takes_rows"):
            raise AttributeError(name)
        return getattr(self._session, name)


@contextmanager
def _locked(caches: Sequence[Cache]) -> Iterator[None]:
    """While no other run uses these caches. Raises CacheError if one does."""
    with ExitStack() as stack:
        for row, cache in enumerate(caches):
            if cache in caches[:row]:
                continue  # the store says of which row it is
            if not cache.run_lock.acquire(blocking=False):
                raise CacheError(
                    "run: expected a cache that no other run uses, got one in use; give each thread its own"
                )
            stack.callback(cache.run_lock.release)
        yield


def quiet_options() -> ort.SessionOptions:
    """Session options that log errors only: onnxruntime warns of every graph input that has a default."""
    options = ort.SessionOptions()
    options.log_severity_level = ERROR
    return options


def taking_turns() -> ort.SessionOptions:
    """Options of sessions that are timed in turns: their threads stop spinning when a run ends, and leave the cores."""
    options = quiet_options()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def open_model(
    model: str | os.PathLike[str] | bytes,
    options: ort.SessionOptions | None = None,
    providers: Sequence[Any] | None = None,
) -> ort.InferenceSession:
    """An onnxruntime session of any model. Raises UnsupportedModelError if the file is missing or can't be loaded."""
    where = _name(model)
    if not isinstance(model, bytes) and not model_path(model).is_file():
        got = "something that is no regular file" if model_path(model).exists() else "nothing there"
        raise UnsupportedModelError(f"{where}: expected an ONNX file, got {got}; check the path")
    source = model if isinstance(model, bytes) else where
    try:
        return ort.InferenceSession(source, options or quiet_options(), providers or ["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"{where}: expected a model that onnxruntime {ort.__version__} loads, got: {reason}"
        ) from error


def open_stepper(model: str | os.PathLike[str]) -> Stepper:
    """A Stepper of a rewritten model, on a cache of its own, or of any other model, carrying its cache."""
    try:
        session = Session(model)
    except NotRewrittenError:
        return Stepper(open_model(model))
    return Stepper(session, session.new_cache())


def _name(model: str | os.PathLike[str] | bytes) -> str:
    return "model" if isinstance(model, bytes) else str(model_path(model))
