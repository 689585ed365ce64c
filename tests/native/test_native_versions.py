"""The range of onnxruntime that the native host runs in: 1.17 to the one that is installed."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodes import feeds, model
from stepping import sdpa, tokens

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

OLDEST = "1.17.3"  # the last 1.17; its wheels end with Python 3.12

PROGRAM = """
import sys
import numpy as np
import onnxruntime as ort
library, folder = sys.argv[1:]
options = ort.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(library)
session = ort.InferenceSession(folder + "/model.onnx", options, providers=["CPUExecutionProvider"])
feeds = dict(np.load(folder + "/feeds.npz"))
first, second = session.run(None, feeds), session.run(None, feeds)
try:
    session.run(None, feeds | {"query": feeds["query"][..., :2]})
except Exception as error:
    assert "onnx_kivi CacheError" in str(error), error
else:
    raise AssertionError("a wrong shape was accepted")
np.savez(folder + "/outputs.npz", first=first[1], second=second[1], past=second[0])
print(ort.__version__)
"""


def test_an_onnxruntime_that_is_too_old_is_refused_in_words() -> None:
    """The library is shown an OrtApiBase that knows version 16 at most."""
    said: list[str] = []
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)

    def status(code: int, message: bytes) -> int:
        said.append(f"{code} {message.decode()}")
        return 1

    made = create_status(status)
    api = (ctypes.c_void_p * 1)(ctypes.cast(made, ctypes.c_void_p).value)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(api) if version <= 16 else None
    )
    text = ctypes.create_string_buffer(b"1.16.3")
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(text))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (get_api, get_version)))
    register = ctypes.CDLL(native.library_path()).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, base) == 1
    assert said == ["9 onnx_kivi: expected onnxruntime 1.17 or later, got 1.16.3; upgrade onnxruntime"]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info >= (3, 13), reason=f"onnxruntime {OLDEST} has no wheel for this Python")
def test_the_oldest_onnxruntime_that_we_support_computes_the_same(tmp_path: Path) -> None:
    """Bit for bit: the kernel is ours, and onnxruntime only hands over memory."""
    rng = np.random.default_rng(5)
    (tmp_path / "model.onnx").write_bytes(model([sdpa(0)], "oldest").SerializeToString())
    inputs: dict[str, Any] = feeds(tokens(rng, 30), tokens(rng, 30))
    np.savez(tmp_path / "feeds.npz", **inputs)
    packages = tmp_path / "packages"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(packages)]
    installed = subprocess.run([*pip, f"onnxruntime=={OLDEST}", "numpy<2"], capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"pip could not install onnxruntime {OLDEST}: {installed.stderr.strip()[-200:]}")
    results = {}
    for version, path in ((OLDEST, [str(packages)]), ("installed", [])):
        lines = [f"import sys; sys.path[:0] = {path!r}", PROGRAM]
        command = [sys.executable, "-c", "\n".join(lines), native.library_path(), str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        results[version] = done.stdout.strip(), dict(np.load(tmp_path / "outputs.npz"))
        Path(tmp_path / "outputs.npz").unlink()
    assert results[OLDEST][0] == OLDEST != results["installed"][0]
    for name, array in results[OLDEST][1].items():
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(array, results["installed"][1][name])
