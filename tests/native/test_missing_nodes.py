"""A model that says more nodes than it has: a plain session of either host is told at its second run, and one whose run
was stopped is not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import nodes
import onnx_kivi as kivi
from nodes import feeds, model
from stepping import sdpa, tokens

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

MESSAGE = "expected the last run to end, but 2 of 5 nodes ran"


def session(proto: Any) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    native.register(options)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_the_native_host_says_so_in_its_second_run(rng: np.random.Generator) -> None:
    served = session(model([sdpa(0), sdpa(1)], "missing", step_wire={"layers": 5}))
    key = tokens(rng, 9)
    served.run(None, feeds(key, key))
    with pytest.raises(Exception, match=MESSAGE):
        served.run(None, feeds(key, key))


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_the_python_host_says_so_in_its_second_run(
    rng: np.random.Generator, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    served = nodes.session(model([sdpa(0), sdpa(1)], f"missing {backend}", step_wire={"layers": 5}), backend)
    key = tokens(rng, 9)
    assert np.isfinite(served.run(None, feeds(key, key))[1]).all()
    with caplog.at_level(logging.ERROR, logger="onnx_kivi"):
        assert np.isnan(served.run(None, feeds(key, key))[1]).all()
    assert MESSAGE in caplog.text


def breakable(model_id: str) -> Any:
    """A model of two nodes with one of onnxruntime's own between them, which fails unless `shape` is right."""
    proto = model([sdpa(0), sdpa(1)], model_id)
    first, second = [node for node in proto.graph.node if node.op_type == "QuantizedKvSdpa"]
    second.input[0] = "again"
    proto.graph.node.insert(2, helper.make_node("Reshape", [first.output[0], "shape"], ["again"]))
    proto.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, None))
    return proto


def test_a_first_run_in_which_another_node_failed_is_not_taken_for_one_of_missing_nodes(
    rng: np.random.Generator,
) -> None:
    served = session(breakable("breaks"))
    key = tokens(rng, 9)
    right, wrong = np.array(key.shape, np.int64), np.array([7], np.int64)
    for _ in range(3):
        with pytest.raises(Exception, match="Reshape"):
            served.run(None, feeds(key, key) | {"shape": wrong})
    assert served.run(None, feeds(key, key) | {"shape": right})[0].tolist() == [0]
    with pytest.raises(Exception, match="Reshape"):
        served.run(None, feeds(key, key) | {"shape": wrong})
    assert served.run(None, feeds(key, key) | {"shape": right})[0].tolist() == [9]


def test_the_python_host_runs_again_after_it_has_said_so(rng: np.random.Generator) -> None:
    """It can't tell a run that another node ended from one of missing nodes: it says so once."""
    served = nodes.session(breakable("breaks python"), "numpy")
    key = tokens(rng, 9)
    right, wrong = np.array(key.shape, np.int64), np.array([7], np.int64)
    with pytest.raises(Exception, match="Reshape"):
        served.run(None, feeds(key, key) | {"shape": wrong})
    assert np.isnan(served.run(None, feeds(key, key) | {"shape": right})[1]).all()
    assert np.isfinite(served.run(None, feeds(key, key) | {"shape": right})[1]).all()


def test_a_session_of_ours_knows_that_its_run_failed(
    open_session: Callable[[Path], kivi.Session], tmp_path: Path, rng: np.random.Generator
) -> None:
    onnx.save(breakable("breaks session"), tmp_path / "model.onnx")
    served = open_session(tmp_path / "model.onnx")
    key = tokens(rng, 9)
    right, wrong = np.array(key.shape, np.int64), np.array([7], np.int64)
    inputs = feeds(key, key)
    with pytest.raises(Exception, match="Reshape"):
        served.run(None, inputs | {"shape": wrong})
    served.run(None, inputs | {"shape": right})
    assert served.cache.sealed_tokens > 0
