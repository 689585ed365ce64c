"""Fixtures shared by the tests: each backend that this machine has, a tiny decoder, and rewrites of it."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnx_kivi as kivi
import ort_headers
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.select import get_backend
from onnx_kivi_models.tiny import tiny_decoder

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's job in the background ignores SIGINT, and so would every process that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["numpy", "native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every test that takes this runs once per backend."""
    try:
        return get_backend(request.param)
    except kivi.BackendUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of a tiny random decoder: two layers, four heads over two kv heads."""
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    onnx.save(tiny_decoder(sharpness=1.4), path)
    return path


@pytest.fixture(scope="session")
def rewritten(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Path of the tiny decoder rewritten at given bits, with blocks of 16 tokens, 8 recent and 2 sink tokens."""
    made: dict[int, Path] = {}

    def at(bits: int) -> Path:
        if bits not in made:
            config = kivi.KiviConfig(bits, bits, block_tokens=16, residual_length=8, sink_length=2)
            made[bits] = tmp_path_factory.mktemp(f"bits{bits}") / "model.onnx"
            kivi.save(kivi.rewrite(tiny, config)[0], made[bits])
        return made[bits]

    return at


@pytest.fixture(params=["python", "native"])
def open_session(request: pytest.FixtureRequest) -> Callable[[Path], kivi.Session]:
    """Opens sessions on each host that this machine has."""

    def opened(path: Path) -> kivi.Session:
        try:
            return kivi.Session(path, host=request.param)
        except kivi.BackendUnavailableError as error:
            pytest.skip(str(error))

    return opened


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that starts from the same state in every test."""
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def onnxruntime_include(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of onnxruntime's official C and C++ headers; skips where they can't be had."""
    try:
        return ort_headers.include_directory(tmp_path_factory.mktemp("onnxruntime_headers"))
    except ort_headers.HeadersUnavailableError as error:
        pytest.skip(str(error))
