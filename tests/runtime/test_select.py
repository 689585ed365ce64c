"""Which backend serves: by name, by environment, and without the compiled module."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from onnx_kivi.errors import BackendUnavailableError, ConfigError
from onnx_kivi.runtime import select
from onnx_kivi.runtime.backend import Backend


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which the compiled module is missing."""
    monkeypatch.setitem(sys.modules, "onnx_kivi.runtime.native", None)
    monkeypatch.delenv(select.ENVIRONMENT, raising=False)
    select._native.cache_clear()
    select._warn_once.cache_clear()
    yield
    select._native.cache_clear()
    select._warn_once.cache_clear()


def test_each_backend_is_one_object(backend: Backend) -> None:
    assert select.get_backend(backend.name) is backend


def test_the_environment_decides_for_auto_only(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setenv(select.ENVIRONMENT, "numpy")
    assert select.get_backend("auto").name == "numpy"
    assert select.get_backend(backend.name).name == backend.name
    monkeypatch.setenv(select.ENVIRONMENT, "fast")
    with pytest.raises(ConfigError, match="ONNX_KIVI_BACKEND: expected one of auto, native, numpy, got 'fast'"):
        select.get_backend("auto")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="backend: expected one of auto, native, numpy, got 'cuda'"):
        select.get_backend("cuda")


@pytest.mark.usefixtures("no_native")
def test_without_the_compiled_module_native_says_why() -> None:
    with pytest.raises(BackendUnavailableError, match=r"expected the compiled module onnx_kivi\._native, got "):
        select.get_backend("native")


@pytest.mark.usefixtures("no_native")
def test_without_the_compiled_module_auto_is_numpy_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "onnx_kivi"):
        assert select.get_backend("auto").name == "numpy"
        assert select.get_backend("auto").name == "numpy"
    assert len(caplog.records) == 1
    assert "slower NumPy backend" in caplog.text
