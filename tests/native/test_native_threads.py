"""The native backend under several threads, and in the child of a fork."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from stepping import assert_same, run, sdpa, tokens

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

NODES = [sdpa(0, block_tokens=16, v_group_size=16), sdpa(1, block_tokens=16, v_group_size=16, is_causal=1)]


def test_caches_used_by_several_threads_at_once_hold_and_give_what_each_alone_would() -> None:
    """With two workers in the pool and calls large enough to share out; whoever finds the pool taken works alone,
    on the same tasks, so the outputs are equal bit for bit."""
    code = """
import test_native_threads as t
t.compare()
"""
    environment = os.environ | {"ONNX_KIVI_THREADS": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def compare() -> None:
    """Four threads with a cache each, against the same work done in turn."""
    backend = native.NativeBackend()
    assert native.thread_count() == 3
    data = [tokens(np.random.default_rng(seed), 700, heads=2, size=64) for seed in range(4)]

    def generate(key: npt.NDArray[np.float32]) -> tuple[int, list[list[npt.NDArray[np.float32]]]]:
        handle = backend.new_cache()
        cuts = [0, 600, 601, 602, 690, 700]
        outputs = [run(backend, handle, NODES, key[:, :, a:b], key[:, :, a:b]) for a, b in itertools.pairwise(cuts)]
        return handle, outputs

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(generate, data))
    for key, (handle, outputs) in zip(data, together, strict=True):
        alone, expected = generate(key)
        assert backend.sealed_tokens(handle) > 600
        assert_same(backend.export_state(handle), backend.export_state(alone))
        for got, want in zip(outputs, expected, strict=True):
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)


def test_the_child_of_a_fork_goes_on_without_the_threads_it_has_not() -> None:
    code = """
import os, warnings
import numpy as np
import test_native_threads as t
warnings.simplefilter("ignore")
backend = t.native.NativeBackend()
key = t.tokens(np.random.default_rng(1), 600, heads=2, size=64)
handle = backend.new_cache()
before = t.run(backend, handle, t.NODES, key, key)
child = os.fork()
if child == 0:
    other = backend.new_cache()
    after = t.run(backend, other, t.NODES, key, key)
    equal = all(np.array_equal(a, b) for a, b in zip(before, after))
    os._exit(0 if equal and backend.length(handle) == 600 else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = os.environ | {"ONNX_KIVI_THREADS": "2", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
