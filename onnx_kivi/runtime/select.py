"""Chooses the backend: one instance of each per process."""

from __future__ import annotations

import functools
import logging
import os

from ..errors import BackendUnavailableError, ConfigError
from ..paths import source_tree
from .backend import Backend
from .numpy_backend.store import NumpyBackend

BACKENDS = ("auto", "native", "numpy")
ENVIRONMENT = "ONNX_KIVI_BACKEND"

NUMPY: Backend = NumpyBackend()

log = logging.getLogger("onnx_kivi")


def get_backend(name: str = "auto") -> Backend:
    """The backend of that name. `auto` is what ONNX_KIVI_BACKEND says, else native, else NumPy with a logged warning.

    Raises ConfigError for an unknown name or ISA level, BackendUnavailableError for one that is not built here.
    """
    source = "backend"
    if name == "auto":
        name, source = os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT
    if name not in BACKENDS:
        raise ConfigError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "numpy":
        return NUMPY
    if name == "native":
        return _native()
    try:
        return _native()
    except BackendUnavailableError as error:
        _warn_once(str(error))
        return NUMPY


@functools.cache
def _native() -> Backend:
    try:
        from .native import NativeBackend

        backend: Backend = NativeBackend()
    except ImportError as error:
        raise BackendUnavailableError(
            f"backend native: expected the compiled module onnx_kivi._native, got {_instead(error)}, or use "
            "backend='numpy'"
        ) from error
    return backend


def _instead(error: ImportError) -> str:
    """What was got in the place of the compiled module, and what to do."""
    root = source_tree()
    if root is not None:
        return (
            f"the source tree at {root}, not the installed package: run from another folder or set PYTHONSAFEPATH=1 "
            "to use the installed one"
        )
    return f"the error {str(error)!r}; install a C++ compiler and then onnx_kivi again"


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning("%s. Using the slower NumPy backend.", reason)
