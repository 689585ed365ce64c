"""Ctrl-C while onnxruntime runs: noticed at once, and never inside an op's callback, where an exception would abort.

Native host: Python handles a signal when onnxruntime returns, which may be seconds later. `stopped_by_interrupt` has
the system tell another thread of it at once, by the wakeup descriptor, and that ends the run.

Python host: a signal that arrives while onnxruntime computes is handled at the next Python bytecode, which is the first
of some op's callback, outside any try block that could be put there. So the handler looks where it is: inside a
callback it only takes note, lets the op fail in an orderly way (`check`), and delivers the signal a little later.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TypeVar

import onnxruntime as ort

REDELIVERY_SECONDS = 0.005
NOBODY = -1

Result = TypeVar("Result")


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


class _Watcher:
    """A thread that waits for bytes of the signals, and ends the runs that are going on."""

    def __init__(self) -> None:
        self._running: set[ort.RunOptions] = set()
        self._stopped: set[ort.RunOptions] = set()
        self._descriptor: int | None = None

    def watched(self, run: Callable[[], Result], options: ort.RunOptions) -> Result:
        """What `run` gives; SIGINT ends it, by these options of it. On the main thread only."""
        previous = signal.set_wakeup_fd(self._started())
        if previous != NOBODY:  # another's loop: signals are its own
            signal.set_wakeup_fd(previous)
        self._running.add(options)
        try:
            return run()
        finally:
            try:
                _raise_waiting()
            finally:
                self._end(options, previous)

    def _end(self, options: ort.RunOptions, previous: int) -> None:
        self._running.discard(options)
        if options in self._stopped:  # they are the caller's, who may use them again
            self._stopped.discard(options)
            options.terminate = False
        if previous == NOBODY:
            signal.set_wakeup_fd(NOBODY)

    def forget(self) -> None:
        """In a forked child the thread is gone, and the pipe is the parent's."""
        self._running.clear()
        self._stopped.clear()
        self._descriptor = None

    def _started(self) -> int:
        if self._descriptor is None:
            reader, self._descriptor = os.pipe()
            os.set_blocking(self._descriptor, False)
            threading.Thread(target=self._watch, args=(reader,), name="onnx_kivi interrupts", daemon=True).start()
        return self._descriptor

    def _watch(self, reader: int) -> None:
        while received := os.read(reader, 1):
            if received[0] == signal.SIGINT:
                for options in tuple(self._running):
                    self._stopped.add(options)
                    options.terminate = True


def _raise_waiting() -> None:
    """Have the interrupt that came during a run raise at this call, where it is expected, and not in what follows."""


_watcher = _Watcher()
os.register_at_fork(after_in_child=_watcher.forget)


def stopped_by_interrupt(run: Callable[[], Result], options: ort.RunOptions) -> Result:
    """What `run`, an onnxruntime run with these options, gives. Ctrl-C ends it at once, if it would raise afterwards.

    No context manager: the interrupt would be raised in its exit, before that has done anything.
    """
    if threading.current_thread() is threading.main_thread() and _raises(signal.getsignal(signal.SIGINT)):
        return _watcher.watched(run, options)
    return run()


def _raises(handler: object) -> bool:
    """Whether the handler of SIGINT is Python's own, or ours, which raise; another may want the run to go on."""
    return handler is signal.default_int_handler or isinstance(getattr(handler, "__self__", None), InterruptGuard)
