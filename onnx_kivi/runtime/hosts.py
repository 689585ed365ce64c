"""Who serves the nodes inside onnxruntime: the Python op (any backend) or the native library (native backend only)."""

from __future__ import annotations

import os
from typing import Any

import onnx
import onnxruntime as ort
import onnxruntime_extensions

from ..errors import BackendUnavailableError, ConfigError
from . import host as python_host
from .backend import Backend
from .select import get_backend

HOSTS = ("auto", "python", "native")


def choose(host: str = "auto", backend: str = "auto") -> tuple[str, Backend]:
    """(host, backend) for what a user asked. `auto` is native where it is built and the backend is native.

    Raises ConfigError for an unknown host, BackendUnavailableError for one that isn't here.
    """
    if host not in HOSTS:
        raise ConfigError(f"host: expected one of {', '.join(HOSTS)}, got {host!r}")
    chosen = get_backend("native" if host == "native" and backend == "auto" else backend)
    if host == "native" and chosen.name != "native":
        raise BackendUnavailableError(
            f"host: expected backend native with host native, got {chosen.name}; use host='python'"
        )
    return ("python" if host == "auto" else host), chosen


def register(options: ort.SessionOptions, *, host: str = "auto", backend: str = "auto") -> None:
    """Make onnxruntime sessions made with `options` know the ops. Raises as `choose` does."""
    _, chosen = choose(host, backend)
    python_host.register(options, chosen.name)


def take_error(host: str, handle: int, failure: Exception | None) -> BaseException | None:  # noqa: ARG001
    """What the op refused in the last run on `handle`, if anything; `failure` is what onnxruntime raised."""
    error: BaseException | None = python_host.take_error(handle)
    return error


def library_path() -> str:
    """Path of the native custom-op library, for SessionOptions.register_custom_ops_library.

    Raises BackendUnavailableError where it was not built.
    """
    raise BackendUnavailableError("library_path: expected the native library, got an install without it")


def describe() -> dict[str, Any]:
    """Facts for `info`: what is chosen here, and what it is chosen from."""
    host, backend = choose()
    return {
        "host": host,
        "backend": backend.name,
        "isa": "numpy",
        "threads": os.cpu_count(),
        "onnx": onnx.__version__,
        "onnxruntime": ort.__version__,
        "onnxruntime_extensions": onnxruntime_extensions.__version__,
    }
