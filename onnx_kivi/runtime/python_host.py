"""Serves the ops to onnxruntime as onnxruntime-extensions Python ops, on any backend; declared from the spec.

Contract: no exception ever leaves an op, because that aborts the process. The first error of a cache's step is
remembered (`take_error`) and logged; the node, and the later ones of the step, return NaN. A model's default cache
(handle 0) lives in the backend that `register` named last; any other handle or ticket says which backend it is of.
Nodes must have all their attributes written out, as the rewriter does: onnxruntime-extensions knows no defaults.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import traceback
from collections.abc import Callable, Sequence
from types import CodeType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime_extensions import PyCustomOpDef, get_library_path, onnx_op
from onnxruntime_extensions import _ocos as hook

from ..arrays import FloatArray, IntArray
from ..errors import CacheError, KiviError
from ..spec import (
    ALL_NEW,
    CACHE_OPEN,
    CACHE_STAMP,
    COMMITTED_LENGTH,
    DEFAULT_HANDLE,
    DOMAIN,
    KV_CACHE_STEP,
    KV_CACHE_STEP_V2,
    NO_STEP,
    QUANTIZED_KV_SDPA,
    QUANTIZED_KV_SDPA_V2,
    SdpaAttributes,
    StepAttributes,
)
from ..spec_types import OpSpec
from .backend import Backend, is_native, ticket_handle
from .interrupts import InterruptGuard
from .select import get_backend

MOST_PLAUSIBLE_LENGTH = 1 << 20
NO_CACHE = -1  # a handle that no backend has: the step that is opened with it fails
MOST_FAILURES = 4096  # a plain session's caller never takes them
ELEMENTS = {"float": PyCustomOpDef.dt_float, "int64": PyCustomOpDef.dt_int64}
WIRES = {"int": PyCustomOpDef.dt_int64, "string": PyCustomOpDef.dt_string}

log = logging.getLogger("onnx_kivi")


class _Output:
    """An op's result as onnxruntime-extensions takes it: it calls `.flatten().tolist()`, but accepts an array there,
    which saves building a list of Python floats."""

    __slots__ = ("_array", "shape")

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self._array = np.ascontiguousarray(array)
        self.shape = array.shape

    def flatten(self) -> _Output:
        return self

    def tolist(self) -> npt.NDArray[Any]:
        return self._array


class PythonHost:
    """The ops, and the errors that their callers have yet to be told."""

    def __init__(self) -> None:
        self._default_backend: Backend | None = None
        self._failures: dict[int, tuple[int, BaseException]] = {}
        self._interrupts = InterruptGuard(_callback())

    def serve(self, backend: str) -> None:
        """Make the ops known, with `backend` for default caches."""
        self._default_backend = get_backend(backend)
        self._interrupts.install()
        _declare()

    def take_error(self, handles: Sequence[int]) -> BaseException | None:
        """The first error of the last step on these caches, once; None if it went well."""
        found = [self._failures.pop(handle, (NO_STEP, None))[1] for handle in handles]
        error = next((error for error in found if error is not None), None)
        if error is None or isinstance(error, KiviError):
            return error
        if isinstance(error, Exception):
            unexpected = CacheError(
                f"cache {handles[0]}: expected the op to run, got {_described(error)}; please report it"
            )
            unexpected.__cause__ = error
            return unexpected
        self._interrupts.delivered()
        return error

    def kv_cache_step(self, cache_handle: IntArray, past_length: IntArray, **wire: str) -> tuple[_Output, _Output]:
        """The op KvCacheStep: (P, ticket), or (a P that later shapes agree with, -1) after an error."""
        past, ticket = self._open("KvCacheStep", (cache_handle, past_length), wire)
        return _Output(np.array([max(past)], np.int64)), _Output(np.array([ticket], np.int64))

    def kv_cache_step_v2(
        self, cache_handle: IntArray, past_length: IntArray, new_length: IntArray, **wire: str
    ) -> tuple[_Output, _Output, _Output]:
        """The op KvCacheStepV2: (the largest P, each row's, ticket)."""
        past, ticket = self._open("KvCacheStepV2", (cache_handle, past_length, new_length), wire)
        return (
            _Output(np.array([max(past)], np.int64)),
            _Output(np.array(past, np.int64)),
            _Output(np.array([ticket], np.int64)),
        )

    def _open(self, op: str, inputs: tuple[IntArray, ...], wire: dict[str, str]) -> tuple[tuple[int, ...], int]:
        handles: list[int] = [DEFAULT_HANDLE]
        lengths: list[int] = [COMMITTED_LENGTH]
        try:
            self._interrupts.check()
            handles = _numbers(op, inputs[0])  # known before the rest is read, which may be what is wrong
            lengths, new = (*(_numbers(op, array) for array in inputs[1:]), [ALL_NEW])[:2]
            attributes = _step_attributes(tuple(wire.items()))
            past, ticket = self._backend(handles[0]).open_rows(handles, lengths, new, attributes)
            for handle in (*handles, *self._backend(ticket_handle(ticket)).members(ticket)):
                self._failures.pop(handle, None)
        except BaseException as error:
            self._fail(handles, NO_STEP, error)
            return (self._likely_length(handles, lengths),), NO_STEP
        return past, ticket

    def cache_open(
        self,
        cache_handle: IntArray,
        past_length: IntArray,
        new_shape: IntArray,
        mask_shape: IntArray,
        *_: FloatArray,
        **__: str,
    ) -> tuple[_Output, _Output]:
        """The op CacheOpen where caches are given: they and their lengths, as they are; after an error no cache."""
        if cache_handle.tolist() != [DEFAULT_HANDLE]:
            return _Output(cache_handle), _Output(past_length)
        refusal = CacheError(
            "CacheOpen: expected a cache_handle under the Python host, which reads no stamps, got none; run the model "
            "with onnx_kivi.Session, or with the native host"
        )
        self._fail([DEFAULT_HANDLE], NO_STEP, refusal)
        return _Output(np.array([NO_CACHE], np.int64)), _Output(mask_shape[1:] - new_shape[1:])

    def cache_stamp(self, *inputs: Any, **_: str) -> tuple[_Output, _Output]:
        """The op CacheStamp where caches are given: the past as it is."""
        return _Output(inputs[-2]), _Output(inputs[-1])

    def quantized_kv_sdpa(
        self,
        query: FloatArray,
        key: FloatArray,
        value: FloatArray,
        attn_mask: FloatArray,
        head_sink: FloatArray,
        step: IntArray,
        **wire: str,
    ) -> _Output:
        """The op QuantizedKvSdpa: (B, Hq, S, Dv), NaN after an error."""
        ticket = NO_STEP
        try:
            ticket = int(step.flat[0])
            handle = ticket_handle(ticket)
            self._interrupts.check()
            if ticket != NO_STEP and not self._has_failed(ticket):
                attributes = _sdpa_attributes(tuple(wire.items()))
                return _Output(
                    self._backend(handle).attend(ticket, attributes, query, key, value, attn_mask, head_sink)
                )
        except BaseException as error:
            self._fail(self._members(ticket), ticket, error)
            if not isinstance(error, Exception):
                self._end_step(self._members(ticket))
        return _Output(_nan(query, value))

    def _has_failed(self, ticket: int) -> bool:
        return any(failed == ticket for failed, _ in tuple(self._failures.values())) if self._failures else False

    def _members(self, ticket: int) -> Sequence[int]:
        """Handles of the caches of a step, as far as they can be told."""
        handle = ticket_handle(ticket)
        try:
            return self._backend(handle).members(ticket) or (handle,)
        except BaseException:
            return (handle,)

    def _backend(self, handle: int) -> Backend:
        if handle == DEFAULT_HANDLE and self._default_backend is not None:
            return self._default_backend
        return get_backend("native" if is_native(handle) else "numpy")

    def _fail(self, handles: Sequence[int], ticket: int, error: BaseException) -> None:
        try:
            traceback.clear_frames(error.__traceback__)
            told = any(self._failures.get(handle, (NO_STEP, None))[0] == ticket for handle in handles)
            if ticket == NO_STEP or not told:
                self._failures |= dict.fromkeys(handles, (ticket, error))
                while len(self._failures) > MOST_FAILURES:
                    self._failures.pop(next(iter(self._failures)), None)
                if isinstance(error, Exception):
                    log.error("%s", _described(error))
        except BaseException as unreportable:
            self._failures[handles[0]] = ticket, unreportable

    def _end_step(self, handles: Sequence[int]) -> None:
        """Close what an interrupt left open, which would pass for the step of a model that lacks nodes."""
        with contextlib.suppress(BaseException):
            for handle in handles:
                backend = self._backend(handle)
                backend.crop(handle, backend.length(handle))

    def _likely_length(self, handles: Sequence[int], past_lengths: Sequence[int]) -> int:
        """What the caller probably takes for P: with it, onnxruntime finds no fault of its own in the mask's shape."""
        try:
            if COMMITTED_LENGTH in past_lengths:
                return max(self._backend(handle).length(handle) for handle in handles)
        except BaseException:
            return 0
        return min(max(0, *past_lengths), MOST_PLAUSIBLE_LENGTH)


def register(options: ort.SessionOptions, backend: str = "auto") -> None:
    """Make sessions that are built with `options` know the ops.

    `backend` serves the default caches (handle 0) of all sessions of this process. Raises as get_backend does.
    """
    HOST.serve(backend)
    options.register_custom_ops_library(get_library_path())


def take_error(handles: Sequence[int]) -> BaseException | None:
    """The first error of the last step on these caches, once: a KiviError, or the KeyboardInterrupt that ended it."""
    return HOST.take_error(handles)


@functools.cache
def _declare() -> None:
    """Declare the ops, once per process, to onnxruntime-extensions."""
    bodies: dict[OpSpec, Callable[..., object]] = {
        KV_CACHE_STEP: HOST.kv_cache_step,
        KV_CACHE_STEP_V2: HOST.kv_cache_step_v2,
        QUANTIZED_KV_SDPA: HOST.quantized_kv_sdpa,
        QUANTIZED_KV_SDPA_V2: HOST.quantized_kv_sdpa,
        CACHE_OPEN: HOST.cache_open,
        CACHE_STAMP: HOST.cache_stamp,
    }
    for spec, body in bodies.items():
        declare = onnx_op(
            op_type=f"{DOMAIN}::{spec.name}",
            inputs=[ELEMENTS[t.element] for t in spec.inputs],
            outputs=[ELEMENTS[t.element] for t in spec.outputs],
            attrs={a.name: WIRES[a.wire] for a in spec.attributes},
        )
        declare(body).cast_attributes = _as_text


def _callback() -> CodeType:
    """The function that onnxruntime-extensions calls from C++: no exception may leave it, nor start in it."""
    callback = getattr(hook, "_on_pyop_invocation", PythonHost.quantized_kv_sdpa)
    return callback.__code__


def _as_text(attributes: dict[str, str]) -> dict[str, str]:
    """Attributes as they arrive: the library's own conversion takes longer than all else here, and the spec parses."""
    return attributes


@functools.lru_cache(maxsize=4096)
def _sdpa_attributes(wire: tuple[tuple[str, str], ...]) -> SdpaAttributes:
    return SdpaAttributes.from_wire(dict(wire))


@functools.lru_cache(maxsize=64)
def _step_attributes(wire: tuple[tuple[str, str], ...]) -> StepAttributes:
    return StepAttributes.from_wire(dict(wire))


def _numbers(op: str, value: IntArray) -> list[int]:
    """The numbers of an input with one for all rows or one for each. Raises CacheError."""
    if value.ndim != 1 or not value.size:
        raise CacheError(f"{op}: expected shape (1) or (rows), got {value.shape}")
    return [int(number) for number in value]


def _described(error: BaseException) -> str:
    """An error's message; of an unforeseen one also its type, and that without trusting its __str__."""
    return str(error) if isinstance(error, KiviError) else "".join(traceback.format_exception_only(error)).strip()


def _nan(query: FloatArray, value: FloatArray) -> FloatArray:
    """An output of the right shape for these inputs, as far as they have one."""
    try:
        return np.full((*query.shape[:-1], *value.shape[-1:]), np.nan, np.float32)
    except BaseException:
        return np.zeros((0,), np.float32)


HOST = PythonHost()
