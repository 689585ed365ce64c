"""Ctrl-C while the Python host runs: never inside an op's callback, where an exception would abort the process.

A signal that arrives while onnxruntime computes is handled at the next Python bytecode, which is the first of some
op's callback, outside any try block that could be put there. So the handler looks where it is: inside a callback it
only takes note, lets the op fail in an orderly way (`check`), and delivers the signal again a little later. (The native
host notices by itself: custom_ops/threads/interrupts.hpp.)
"""

from __future__ import annotations

import signal
import threading
from types import CodeType, FrameType

REDELIVERY_SECONDS = 0.005


class InterruptGuard:
    """Defers SIGINT out of the calls of `callback`, the function whose frame marks the inside of an op."""

    def __init__(self, callback: CodeType) -> None:
        self._callback = callback
        self._pending: threading.Timer | None = None

    def install(self) -> None:
        """Take SIGINT over where Python's own handler has it; from another thread, or twice, do nothing."""
        on_main_thread = threading.current_thread() is threading.main_thread()
        if on_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)

    def check(self) -> None:
        """Raise KeyboardInterrupt on the main thread if one is waiting to be delivered."""
        if self._pending is not None and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    def delivered(self) -> None:
        """The waiting interrupt has reached the caller by another way: don't deliver it again."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.cancel()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        inside = frame
        while inside is not None and inside.f_code is not self._callback:
            inside = inside.f_back
        self.delivered()
        if inside is None:
            signal.default_int_handler(signum, frame)
        self._pending = threading.Timer(REDELIVERY_SECONDS, signal.raise_signal, (signum,))
        self._pending.daemon = True
        self._pending.start()
