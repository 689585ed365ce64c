"""Ctrl-C while the native host computes: the run ends between two of its tasks, and its tokens are dropped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)

PREAMBLE = f"""
import os, signal, sys, threading, time
sys.path[:0] = {[str(Path(__file__).parents[1]), *sys.path]!r}
import numpy as np
import onnxruntime as ort
from nodes import feeds, model
from onnx_kivi.runtime import native
from onnx_kivi.run.session import Session
from stepping import sdpa, tokens
rng = np.random.default_rng(1)
LAYERS = 40
proto = model([sdpa(i, block_tokens=64, v_group_size=0) for i in range(LAYERS)], "long").SerializeToString()
long, short = tokens(rng, 4000, heads=8, size=128), tokens(rng, 5, heads=8, size=128)
long_feeds, short_feeds = feeds(long, long), feeds(short, short)
def interrupt(is_running=lambda: True):
    def send():
        while not is_running():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=send)
    thread.start()
    return thread
"""


def child(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_long_run_is_ended_and_the_cache_is_as_before() -> None:
    """It would take tens of seconds: 40 layers of 4,000 tokens; one that was not ended would commit them."""
    code = """
session = Session(proto, host="native")
session.run(None, short_feeds)
for _ in range(2):
    sender = interrupt(session.cache.run_lock.locked)
    try:
        session.run(None, long_feeds)
    except KeyboardInterrupt:
        print("interrupted", session.cache.length)
    sender.join()
past, *outputs = session.run(None, short_feeds)
print(past.tolist(), session.cache.length, all(np.isfinite(o).all() for o in outputs))
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
    assert child(code) == "interrupted 5\ninterrupted 5\n[5] 10 True\nTrue\n"


def test_a_plain_session_is_interrupted_too() -> None:
    code = """
options = ort.SessionOptions()
options.log_severity_level = 4
native.register(options)
session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
sender = interrupt()
try:
    try:
        session.run(None, long_feeds)
    except Exception as error:
        assert "the run was interrupted" in str(error), error
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
sender.join()
print(session.run(None, short_feeds)[0].tolist())
"""
    assert child(code) == "interrupted\n[0]\n"


def test_a_run_of_another_thread_goes_on() -> None:
    """As in any Python program, Ctrl-C is the main thread's."""
    code = """
session = Session(proto, host="native")
worker = threading.Thread(target=lambda: session.run(None, feeds(long[:, :, :600], long[:, :, :600])))
worker.start()
try:
    os.kill(os.getpid(), signal.SIGINT)
    worker.join()
except KeyboardInterrupt:
    print("interrupted")
worker.join()
print(session.cache.length)
"""
    assert child(code) == "interrupted\n600\n"


def test_a_handler_of_the_users_own_is_called_and_the_run_still_ends() -> None:
    code = """
calls = []
signal.signal(signal.SIGINT, lambda *_: calls.append("called"))
session = Session(proto, host="native")
sender = interrupt(session.cache.run_lock.locked)
try:
    session.run(None, long_feeds)
except Exception as error:
    print("the run was interrupted, and its tokens are dropped" in str(error))
sender.join()
print(calls, session.cache.length)
"""
    assert child(code) == "True\n['called'] 0\n"


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_no_one_handles_ctrl_c_nothing_changes(handler: signal.Handlers) -> None:
    code = f"""
signal.signal(signal.SIGINT, signal.Handlers({int(handler)}))
Session(proto, host="native")
print(native._native.watch_interrupts(), int(signal.getsignal(signal.SIGINT)))
"""
    assert child(code) == f"False {int(handler)}\n"
