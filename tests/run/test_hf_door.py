"""onnx_kivi.hf where transformers is missing, or is of a version that nobody knows."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from types import ModuleType
versions = {version!r}
for name in ("torch", "transformers"):
    sys.modules[name] = None
    if versions:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__version__ = versions
import onnx_kivi
try:
    import onnx_kivi.hf
except onnx_kivi.ExtraUnavailableError as error:
    assert isinstance(error, ImportError)
    print(error)
"""


def said(version: str | None) -> str:
    """What importing the door says where transformers has this version, or is missing: one line."""
    command = [sys.executable, "-c", PROGRAM.format(version=version)]
    (line,) = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return line


def test_without_transformers_it_says_what_to_install() -> None:
    assert said(None).startswith("onnx_kivi.hf: expected transformers and torch, got: ")
    assert said(None).endswith("; pip install 'onnx_kivi[hf]' torch")


@pytest.mark.parametrize("version", ["4.56.2", "3.0", "6.0.0", "10.1.0.dev0"])
def test_an_unknown_version_is_refused(version: str) -> None:
    assert said(version) == (
        f"onnx_kivi.hf: expected transformers 4.57 to 5.x, got {version}; pip install 'transformers>=4.57,<6'"
    )
