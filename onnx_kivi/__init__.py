"""Makes the KV cache of any exported ONNX decoder small and fast: 8, 4 or 2 bits inside the process (KIVI)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from .config import KiviConfig
from .errors import (
    BackendUnavailableError,
    CacheError,
    ConfigError,
    KiviError,
    SpecMismatchError,
    UnsupportedModelError,
)
from .graph import load, save
from .measure.verify import Verification, verify
from .rewrite.pipeline import inspect, rewrite
from .rewrite.report import Report
from .run.session import Session
from .runtime.cache import Cache
from .runtime.hosts import library_path, register
from .runtime.numpy_backend.quantize import quant_dequant

try:
    __version__ = version("onnx_kivi")
except PackageNotFoundError:
    __version__ = "0+uninstalled"

__all__ = [
    "BackendUnavailableError",
    "Cache",
    "CacheError",
    "ConfigError",
    "KiviConfig",
    "KiviError",
    "Report",
    "Session",
    "SpecMismatchError",
    "UnsupportedModelError",
    "Verification",
    "__version__",
    "inspect",
    "library_path",
    "load",
    "quant_dequant",
    "register",
    "rewrite",
    "save",
    "verify",
]
