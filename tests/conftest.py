"""Fixtures shared by the tests: each backend that this machine has."""

from __future__ import annotations

import pytest

from onnx_kivi.errors import BackendUnavailableError
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.select import get_backend


@pytest.fixture(params=["numpy", "native"])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every test that takes this runs once per backend."""
    try:
        return get_backend(request.param)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
