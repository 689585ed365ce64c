"""The C++ example generates what the Python session does, with the same cache."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import onnx_kivi as kivi
from onnx_kivi_models.tiny import tiny_decoder

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

ROOT = Path(__file__).parents[2]
PROMPT = [7, 200, 31, 5, 90]
NEW_TOKENS = 70


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory, onnxruntime_include: Path) -> Path:
    """The built program; its onnxruntime is the one of the Python package."""
    runtime = next((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so*"), None)
    if runtime is None or shutil.which("g++") is None:
        pytest.skip("no g++ here, or no libonnxruntime in the Python package")
    folder = tmp_path_factory.mktemp("example")
    (folder / "libonnxruntime.so.1").symlink_to(runtime)
    library = Path(native.library_path())
    command = ["g++", "-std=c++20", "-Wall", "-Wextra", "-Werror", str(ROOT / "examples" / "cpp" / "generate.cpp")]
    command += [f"-I{onnxruntime_include}", f"-I{ROOT / 'custom_ops' / 'include'}", str(runtime), str(library)]
    command += [f"-Wl,-rpath,{folder}:{library.parent}", "-o", str(folder / "generate")]
    subprocess.run(command, check=True)
    return folder / "generate"


def test_the_program_generates_what_python_does(example: Path, tmp_path: Path) -> None:
    config = kivi.KiviConfig(block_tokens=16, v_group_size=16, residual_length=0, sink_length=2)
    model, _ = kivi.rewrite(tiny_decoder(), config)
    kivi.save(model, tmp_path / "model.onnx")
    session = kivi.Session(tmp_path / "model.onnx", host="native")
    expected = [
        int(np.ravel(t)[0])
        for t in session.generate(np.array([PROMPT]), max_new_tokens=NEW_TOKENS, cache=session.cache)
    ]
    assert session.cache.sealed_tokens >= 64
    arguments = [tmp_path / "model.onnx", native.library_path(), NEW_TOKENS, *PROMPT]
    printed = subprocess.run([example, *map(str, arguments)], capture_output=True, text=True, check=True).stdout
    tokens, summary = printed.strip().splitlines()
    assert [int(t) for t in tokens.split()] == expected
    length, nbytes, sealed = (int(word) for word in summary.split() if word.isdigit())
    assert (length, sealed) == (len(PROMPT) + NEW_TOKENS - 1, session.cache.sealed_tokens)
    assert nbytes == session.cache.nbytes


def test_the_program_says_what_is_wrong(example: Path, tmp_path: Path) -> None:
    absent = [example, tmp_path / "absent.onnx", native.library_path(), "3", "1"]
    done = subprocess.run(absent, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 1
    assert "absent.onnx" in done.stderr
