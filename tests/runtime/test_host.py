"""The Python host: state over runs, errors as NaN plus take_error, and no abort ever."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nodes
from onnx_kivi.errors import CacheError, ConfigError, SpecMismatchError
from onnx_kivi.runtime import python_host as host
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.select import get_backend
from stepping import assert_same, run, sdpa, tokens


def test_a_plain_session_keeps_its_state_over_runs_rewinds_and_restarts(
    backend: Backend, rng: np.random.Generator
) -> None:
    session = nodes.session(nodes.model([sdpa(0), sdpa(1)], f"plain {backend.name}"), backend.name)
    key, value = tokens(rng, 20), tokens(rng, 20)
    handle = backend.new_cache()
    for start, stop in ((0, 9), (9, 10), (10, 20)):
        expected = run(backend, handle, [sdpa(0), sdpa(1)], key[:, :, start:stop], value[:, :, start:stop])
        past, *outputs = session.run(None, nodes.feeds(key[:, :, start:stop], value[:, :, start:stop]))
        assert past.tolist() == [start]
        for got, want in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(got, want)
    assert backend.sealed_tokens(handle) > 0
    for past_length in (12, 0):
        past, *_ = session.run(None, nodes.feeds(key[:, :, :3], value[:, :, :3], past_length=past_length))
        assert past.tolist() == [past_length]
    past, *_ = session.run(None, nodes.feeds(key[:, :, :3], value[:, :, :3]))
    assert past.tolist() == [3]
    backend.close(handle)


def test_handles_choose_the_cache_and_its_backend(backend: Backend, rng: np.random.Generator) -> None:
    """The session's default backend is NumPy throughout: a native handle still goes to the native backend."""
    session = nodes.session(nodes.model([sdpa(0)], f"handles {backend.name}"), "numpy")
    first, second = backend.new_cache(), backend.new_cache()
    key = tokens(rng, 7)
    for handle, runs in ((first, 2), (second, 1)):
        for _ in range(runs):
            session.run(None, nodes.feeds(key, key, cache_handle=handle))
    assert (backend.length(first), backend.length(second)) == (14, 7)
    assert host.take_error([first]) is None
    backend.crop(first, 7)
    backend.crop(second, 7)
    assert_same(backend.export_state(second), backend.export_state(second))
    backend.close(first)
    backend.close(second)


def test_an_error_gives_nan_one_log_line_and_the_exception_once(
    backend: Backend, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    session = nodes.session(nodes.model([sdpa(0), sdpa(1), sdpa(2)], f"error {backend.name}"), backend.name)
    handle = backend.new_cache()
    key = tokens(rng, 9)
    session.run(None, nodes.feeds(key, key, cache_handle=handle))
    before = backend.export_state(handle)
    wrong = nodes.feeds(key, key, cache_handle=handle) | {"attn_mask": np.zeros((1, 1, 9, 9), np.float32)}
    with caplog.at_level(logging.ERROR, "onnx_kivi"):
        past, *outputs = session.run(None, wrong)
    assert past.tolist() == [9]
    assert [o.shape for o in outputs] == [(1, 2, 9, 6)] * 3
    assert all(np.isnan(o).all() for o in outputs)
    assert len(caplog.records) == 1
    error = host.take_error([handle])
    assert isinstance(error, CacheError)
    assert "attn_mask: expected shape (B=1, Hq=2, S=9, T=18)" in str(error)
    assert host.take_error([handle]) is None
    assert_same(backend.export_state(handle), before)
    past, *outputs = session.run(None, nodes.feeds(key, key, cache_handle=handle))
    assert host.take_error([handle]) is None
    assert all(np.isfinite(o).all() for o in outputs)
    assert backend.length(handle) == 18
    backend.close(handle)


def test_a_later_step_that_goes_well_clears_an_error_nobody_took(backend: Backend, rng: np.random.Generator) -> None:
    session = nodes.session(nodes.model([sdpa(0)], f"clear {backend.name}"), backend.name)
    handle = backend.new_cache()
    key = tokens(rng, 3)
    session.run(None, nodes.feeds(key, key, cache_handle=handle, past_length=5))
    session.run(None, nodes.feeds(key, key, cache_handle=handle))
    assert host.take_error([handle]) is None
    backend.close(handle)


def test_a_step_that_cannot_open_gives_a_past_that_the_mask_agrees_with(
    backend: Backend, rng: np.random.Generator
) -> None:
    """Downstream shapes then agree, so that onnxruntime has nothing of its own to complain about."""
    session = nodes.session(nodes.model([sdpa(0)], f"no step {backend.name}"), backend.name)
    other = nodes.session(nodes.model([sdpa(0)], f"other {backend.name}"), backend.name)
    handle, closed = backend.new_cache(), backend.new_cache()
    backend.close(closed)
    key = tokens(rng, 4)
    session.run(None, nodes.feeds(key, key, cache_handle=handle))
    cases = [
        (session, handle, 9, 9, "past_length: expected -1 or 0 to 4"),
        (session, handle, -7, 0, "past_length: expected -1 or 0 to 4"),
        (session, handle, 2**62, host.MOST_PLAUSIBLE_LENGTH, "past_length: expected -1 or 0 to 4"),
        (other, handle, -1, 4, "expected model no step"),
        (session, closed, -1, 0, "expected an open handle"),
        (session, -5, -1, 0, "expected an open handle"),
        (session, 2**62, 3, 3, "expected an open handle"),
    ]
    for which, number, past_length, likely, message in cases:
        past, out = which.run(None, nodes.feeds(key, key, cache_handle=number, past_length=past_length))
        assert past.tolist() == [likely]
        assert out.shape == (1, 2, 4, 6)
        assert np.isnan(out).all()
        assert message in str(host.take_error([number]))
    assert backend.length(handle) == 4
    backend.close(handle)


def test_rows_of_different_lengths_are_refused_by_a_model_of_version_1(
    backend: Backend, rng: np.random.Generator
) -> None:
    session = nodes.session(nodes.model([sdpa(0)], f"ragged {backend.name}"), backend.name)
    key = tokens(rng, 4, batch=2)
    assert not np.isnan(session.run(None, nodes.feeds(key, key) | {"past_length": np.array([0, 0], np.int64)})[1]).any()
    _, out = session.run(None, nodes.feeds(key, key) | {"past_length": np.array([4, 3], np.int64)})
    assert np.isnan(out).all()
    assert "rewritten by version 1" in str(host.take_error([0]))


@pytest.mark.parametrize(
    ("step_wire", "sdpa_wire", "kind", "message"),
    [
        ({"spec_version": 99}, {}, SpecMismatchError, "spec_version: expected 1 or 2, got 99"),
        ({"layers": 0}, {}, ConfigError, "layers: expected an integer from 1 to"),
        ({}, {"spec_version": 3}, SpecMismatchError, "spec_version: expected 1 or 2, got 3"),
        ({}, {"k_bits": 5}, ConfigError, "k_bits: expected one of 2, 4, 8, 32, got 5"),
        ({}, {"block_tokens": 0}, ConfigError, "block_tokens: expected an integer from 1 to"),
        ({}, {"scale": "fast"}, ConfigError, "scale: expected float"),
        ({}, {"kind": "both"}, ConfigError, "kind: expected one of self, cross"),
    ],
)
def test_a_node_of_another_spec_or_with_bad_attributes_is_refused(
    rng: np.random.Generator,
    step_wire: dict[str, Any],
    sdpa_wire: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    proto = nodes.model([sdpa(0)], f"wire {message}", step_wire=step_wire, sdpa_wire=sdpa_wire)
    session = nodes.session(proto, "numpy")
    backend = get_backend("numpy")
    handle = backend.new_cache()
    key = tokens(rng, 4)
    _, out = session.run(None, nodes.feeds(key, key, cache_handle=handle))
    assert np.isnan(out).all()
    error = host.take_error([handle])
    assert isinstance(error, kind)
    assert message in str(error)


def test_an_unexpected_exception_comes_out_as_a_cache_error_with_its_cause(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend("numpy")
    session = nodes.session(nodes.model([sdpa(0)], "unexpected"), "numpy")
    handle = backend.new_cache()
    monkeypatch.setattr("onnx_kivi.runtime.numpy_backend.node.attend_row", lambda *_: 1 / 0)
    key = tokens(rng, 4)
    _, out = session.run(None, nodes.feeds(key, key, cache_handle=handle))
    error = host.take_error([handle])
    assert np.isnan(out).all()
    assert isinstance(error, CacheError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert backend.length(handle) == 0


PREAMBLE = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parents[1])!r}, {str(Path(__file__).parents[2])!r}]
import nodes, numpy as np
from stepping import sdpa
from onnx_kivi.runtime import python_host as host
from onnx_kivi.runtime.numpy_backend import node, store
key = np.ones((1, 2, 3, 6), np.float32)
session = nodes.session(nodes.model([sdpa(0), sdpa(1)], "child"), "numpy")
"""


def child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "raised",
    [
        "MemoryError()",
        "KeyboardInterrupt()",
        "SystemExit(3)",
        "RecursionError('deep')",
        "type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()",
        "type('Odd', (BaseException,), {})()",
    ],
)
def test_no_exception_in_an_op_aborts_the_process(raised: str) -> None:
    code = f"""
def fail(*_): raise {raised}
node.attend_row = fail
for _ in range(2):
    past, *outputs = session.run(None, nodes.feeds(key, key))
    assert past.tolist() == [0] and all(o.shape == (1, 2, 3, 6) and np.isnan(o).all() for o in outputs)
store.NumpyBackend.open_rows = fail
past, *outputs = session.run(None, nodes.feeds(key, key))
assert all(np.isnan(o).all() for o in outputs) and host.take_error([0]) is not None
print("alive")
"""
    result = child(code)
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr


def test_control_c_ends_a_run_and_leaves_the_process_and_the_cache_whole() -> None:
    """onnxruntime is nearly always computing when the signal comes, so that it is handled within an op."""
    code = """
import time
def run():
    while True:
        past, *_ = session.run(None, nodes.feeds(key, key, past_length=0))
for _ in range(2):
    try:
        print("running", flush=True)
        run()
    except KeyboardInterrupt:
        print("interrupted", flush=True)
past, out, _ = session.run(None, nodes.feeds(key, key, past_length=0))
print(past.tolist(), np.isfinite(out).all(), flush=True)
"""
    command = [sys.executable, "-c", PREAMBLE + code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(60, process.kill)
        watchdog.start()
        try:
            for _ in range(2):
                assert process.stdout.readline() == "running\n"
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                assert process.stdout.readline() == "interrupted\n"
            assert process.stdout.read() == "[0] True\n"
        finally:
            watchdog.cancel()
            process.kill()
