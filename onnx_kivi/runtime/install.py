"""install: every onnxruntime.InferenceSession of this process knows the ops, until uninstall."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from typing import Any

import onnxruntime as ort

from ..errors import ConfigError
from ..spec import DOMAIN
from .hosts import choose, register

_UNKNOWN_OP = re.compile(rf"{DOMAIN}[:.]\w+(\(-?\d+\))? is not a registered")

_lock = threading.Lock()
_installed: list[tuple[Callable[..., None], Callable[..., None]]] = []


def install(*, host: str = "auto", backend: str = "auto") -> None:
    """Let sessions load rewritten models whatever code makes them; all others are made as ever.

    host, backend: who serves the ops, as for Session. A session's options are registered with only where the model asks
    for the ops and they lack them, so options that were registered by hand go on working. Installed twice is installed
    once, as the first call said. Raises as Session does for a host or backend.
    """
    choose(host, backend)
    with _lock:
        if not _installed:
            plain = ort.InferenceSession.__init__
            knowing = _knowing(plain, host, backend)
            _installed.append((plain, knowing))
            ort.InferenceSession.__init__ = knowing


def uninstall() -> None:
    """Undo install, if it was done; sessions made meanwhile stay valid.

    Raises ConfigError where other code has patched InferenceSession since: undo that first.
    """
    with _lock:
        if not _installed:
            return
        ((plain, knowing),) = _installed
        if ort.InferenceSession.__init__ is not knowing:
            raise ConfigError(
                "uninstall: expected InferenceSession.__init__ as install left it, got one that was patched since; "
                "undo that first"
            )
        ort.InferenceSession.__init__ = plain
        _installed.clear()


def _knowing(plain: Callable[..., None], host: str, backend: str) -> Callable[..., None]:
    """`plain`, InferenceSession.__init__, that tries again with the ops where a model turns out to need them."""

    @functools.wraps(plain)
    def init(session: Any, path_or_bytes: Any, sess_options: Any = None, *args: Any, **kwargs: Any) -> None:
        try:
            return plain(session, path_or_bytes, sess_options, *args, **kwargs)
        except Exception as error:
            if not _UNKNOWN_OP.search(str(error)):
                raise
        options = sess_options if sess_options is not None else ort.SessionOptions()
        register(options, host=host, backend=backend)
        return plain(session, path_or_bytes, options, *args, **kwargs)

    return init
