"""Who serves the nodes inside onnxruntime: the Python op (any backend) or the native library (native backend only)."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import onnxruntime as ort

from ..errors import BackendUnavailableError, ConfigError
from .backend import Backend
from .select import get_backend

THREADS_ENVIRONMENT = "ONNX_KIVI_THREADS"
ISA_ENVIRONMENT = "ONNX_KIVI_ISA"
HOSTS = ("auto", "python", "native")
AUTO_HOSTS = {"native": "native", "numpy": "python"}

# onnxruntime refuses a second registration, and its options can't be asked.
_servers: WeakKeyDictionary[ort.SessionOptions, str] = WeakKeyDictionary()
_registering = threading.Lock()


def choose(host: str = "auto", backend: str = "auto") -> tuple[str, Backend]:
    """(host, backend) for what a user asked. Host `auto` is native where the backend is native.

    Raises ConfigError for an unknown host, BackendUnavailableError for one that isn't here.
    """
    if host not in HOSTS:
        raise ConfigError(f"host: expected one of {', '.join(HOSTS)}, got {host!r}")
    chosen = get_backend("native" if host == "native" and backend == "auto" else backend)
    if host == "native" and chosen.name != "native":
        raise BackendUnavailableError(
            f"host: expected backend native with host native, got {chosen.name}; use host='python'"
        )
    return AUTO_HOSTS[chosen.name] if host == "auto" else host, chosen


def register(options: ort.SessionOptions, *, host: str = "auto", backend: str = "auto") -> None:
    """Make onnxruntime sessions made with `options` know the ops, if they don't yet. Any thread may.

    Raises as `choose` does, and ConfigError for options that another host or backend serves.
    """
    server, chosen = choose(host, backend)
    asked = f"host {server}, backend {chosen.name}"
    with _registering:
        known = _servers.get(options)
        if known == asked:
            return
        if known is not None:
            raise ConfigError(f"register: expected session options without the ops, got some of {known}; make new ones")
        if server == "native":
            _native().register(options)
        else:
            _python().register(options, chosen.name)
        _servers[options] = asked


def take_error(host: str, handles: Sequence[int], failure: Exception | None) -> BaseException | None:
    """What the op refused in the last run on these caches, if anything; `failure` is what onnxruntime raised."""
    error: BaseException | None
    if host == "python":
        error = _python().take_error(handles)
    else:
        error = None if failure is None else _native().error_from(failure)
    return error


def library_path() -> str:
    """Path of the native custom-op library, for SessionOptions.register_custom_ops_library.

    Raises BackendUnavailableError where it was not built.
    """
    path: str = _native().library_path()
    return path


def limit_threads(count: int) -> None:
    """Let the native backend use `count` threads; they start with its first work. Raises ConfigError if they have."""
    os.environ[THREADS_ENVIRONMENT] = str(count)
    if get_backend().name == "native" and (running := _native().thread_count()) != count:
        raise ConfigError(
            f"threads: expected {count}, got {running}, with which this process runs already; set "
            f"{THREADS_ENVIRONMENT}={count} before it starts"
        )


def describe() -> dict[str, Any]:
    """Facts for `info`: what is chosen here, why, and what it is chosen from."""
    host, backend = choose()
    facts: dict[str, Any] = {"host": host, "hosts": ["python"], "backend": backend.name, "backends": ["numpy"]}
    try:
        native = _native()
    except BackendUnavailableError as error:
        facts |= {"isa": "numpy", "reason": str(error), "threads": 1}
    else:
        forced = os.environ.get(ISA_ENVIRONMENT)
        facts["backends"].insert(0, "native")
        facts["hosts"].insert(0, "native")
        facts |= {
            "isa": native.isa() if backend.name == "native" else "numpy",
            "isa_levels": native.isa_levels(),
            "reason": f"{ISA_ENVIRONMENT}={forced}" if forced else "the best level that this machine runs",
            "threads": native.thread_count(),
        }
    return facts | {name: version(name) for name in ("onnx", "onnxruntime", "onnxruntime_extensions", "numpy")}


def _python() -> ModuleType:
    """The Python host, imported when it serves: onnxruntime-extensions imports transformers where that is installed."""
    from . import python_host

    return python_host


def _native() -> ModuleType:
    get_backend("native")
    from . import native

    return native
