"""Stock hosts that carry a past, with no code of ours in the loop but the library.

`bash tests/hosts` makes an environment with onnxruntime-genai and optimum-onnx; in any other this folder has no tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

import host_folders


def pytest_ignore_collect() -> bool | None:
    """Leave the folder out where its packages are missing."""
    return True if None in map(find_spec, ("onnxruntime_genai", "optimum", "torch")) else None


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of optimum and of genai."""
    return host_folders.write_original(tmp_path_factory.mktemp("original") / "folder")


@pytest.fixture(scope="session")
def dense(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, rewritten at 32 bits."""
    return host_folders.write_rewritten(original, tmp_path_factory.mktemp("dense") / "folder", 32)


@pytest.fixture(scope="session")
def quantized(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, rewritten at 8 bits; it seals after 26 tokens."""
    return host_folders.write_rewritten(original, tmp_path_factory.mktemp("quantized") / "folder", 8)
