"""Ctrl-C in the middle of a run: it ends the run, on either host, and the cache is as it was before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import onnx
import pytest

import onnx_kivi as kivi
from onnx_kivi.runtime.hosts import describe
from onnx_kivi_models.tiny import tiny_config, tiny_decoder

TIME_LIMIT = 100
INTERRUPTED = """
    import sys
    import numpy as np
    import onnx_kivi as kivi
    import onnxruntime as ort

    def feeds(past, count):
        at, seen = np.arange(past, past + count)[None], np.ones((1, past + count), np.int64)
        return {"input_ids": at % 250, "attention_mask": seen, "position_ids": at}

    session, options = kivi.Session(sys.argv[1], host=sys.argv[2]), ort.RunOptions()
    session.run(["logits"], feeds(0, 200), options)
    print("running", flush=True)
    try:
        session.run(["logits"], feeds(200, 9000), options)
    except KeyboardInterrupt:
        print("interrupted", session.cache.length, session.cache.sealed_tokens > 0)
        session.run(["logits"], feeds(200, 3), options)
    print("then", session.cache.length)
"""


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many layers, whose prefill of some thousand tokens lasts for seconds."""
    path = tmp_path_factory.mktemp("deep") / "model.onnx"
    onnx.save(tiny_decoder(tiny_config(layers=48)), path)
    kivi.save(kivi.rewrite(path)[0], path.with_name("rewritten.onnx"))
    return path.with_name("rewritten.onnx")


@pytest.mark.parametrize("host", ["native", "python"])
def test_an_interrupt_ends_the_run_and_nothing_is_committed(deep: Path, host: str) -> None:
    if host not in describe()["hosts"]:
        pytest.skip(f"no host {host} here")
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(deep), host],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=TIME_LIMIT)
    assert out.splitlines() == ["interrupted 200 True", "then 203"]
    assert process.returncode == 0
