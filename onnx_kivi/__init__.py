"""Makes the KV cache of any exported ONNX decoder small and fast: 8, 4 or 2 bits inside the process (KIVI)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import KiviConfig as KiviConfig
    from .engine.engine import Engine as Engine
    from .errors import BackendUnavailableError as BackendUnavailableError
    from .errors import CacheError as CacheError
    from .errors import ConfigError as ConfigError
    from .errors import ExtraUnavailableError as ExtraUnavailableError
    from .errors import KiviError as KiviError
    from .errors import SpecMismatchError as SpecMismatchError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .graph import load as load
    from .graph import save as save
    from .measure.verify import Verification as Verification
    from .measure.verify import verify as verify
    from .rewrite.pipeline import inspect as inspect
    from .rewrite.pipeline import rewrite as rewrite
    from .rewrite.report import Report as Report
    from .run.session import Session as Session
    from .runtime.cache import Cache as Cache
    from .runtime.hosts import library_path as library_path
    from .runtime.hosts import register as register
    from .runtime.install import install as install
    from .runtime.install import uninstall as uninstall
    from .runtime.numpy_backend.quantize import quant_dequant as quant_dequant

    __version__: str

_HOMES = {
    "BackendUnavailableError": "errors",
    "Cache": "runtime.cache",
    "CacheError": "errors",
    "ConfigError": "errors",
    "Engine": "engine.engine",
    "ExtraUnavailableError": "errors",
    "KiviConfig": "config",
    "KiviError": "errors",
    "Report": "rewrite.report",
    "Session": "run.session",
    "SpecMismatchError": "errors",
    "UnsupportedModelError": "errors",
    "Verification": "measure.verify",
    "install": "runtime.install",
    "inspect": "rewrite.pipeline",
    "library_path": "runtime.hosts",
    "load": "graph",
    "quant_dequant": "runtime.numpy_backend.quantize",
    "register": "runtime.hosts",
    "rewrite": "rewrite.pipeline",
    "save": "graph",
    "uninstall": "runtime.install",
    "verify": "measure.verify",
}

__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604 - the keys of the table are strings

# The first import of a room binds its name here. Of `rewrite`, which is also a public function, that is undone at once.
import_module(".rewrite", __name__)
del globals()["rewrite"]


def __getattr__(name: str) -> Any:
    """A public name, from the module that _HOMES says: none is imported before it is used."""
    if name == "__version__":
        value: Any = _version()
    elif name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("onnx_kivi")
    except PackageNotFoundError:
        return "0+uninstalled"
