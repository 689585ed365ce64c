"""The native host: onnxruntime runs the ops from libonnx_kivi, without Python."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

import onnx_kivi as kivi
from nodes import feeds, model
from onnx_kivi.errors import CacheError, ConfigError, SpecMismatchError
from onnx_kivi.runtime.backend import Backend
from onnx_kivi_models.tiny import tiny_decoder
from stepping import NOTHING, assert_same, run, sdpa, tokens

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.fixture
def backend() -> Any:
    return native.NativeBackend()


def session(proto: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    native.register(options)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def refusal(served: ort.InferenceSession, inputs: dict[str, Any]) -> Exception:
    """What the run was refused with, as the class it has in Python."""
    with pytest.raises(Exception, match="onnx_kivi") as caught:
        served.run(None, inputs)
    error = native.error_from(caught.value)
    assert isinstance(error, Exception)
    return error


def without(proto: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The model without these optional inputs."""
    kept = [i for i in proto.graph.input if i.name not in names]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name in names:
                node.input[i] = ""
    return proto


def retyped(proto: onnx.ModelProto, element: int) -> onnx.ModelProto:
    """The model with float tensors of another type."""
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = element
    return proto


def test_a_session_computes_what_the_backend_does_and_shares_its_caches(
    backend: Backend, rng: np.random.Generator
) -> None:
    nodes = [sdpa(0), sdpa(1, k_bits=4, v_bits=2)]
    served = session(model(nodes, "shared"))
    direct, through = backend.new_cache(), backend.new_cache()
    key, value = tokens(rng, 30), tokens(rng, 30)
    for start, stop in ((0, 17), (17, 18), (18, 30)):
        part = slice(start, stop)
        expected = run(backend, direct, nodes, key[:, :, part], value[:, :, part], model_id="shared")
        past, *outputs = served.run(None, feeds(key[:, :, part], value[:, :, part], cache_handle=through))
        assert past.tolist() == [start]
        for got, want in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(got, want)
    assert backend.sealed_tokens(through) == 28
    assert_same(backend.export_state(direct), backend.export_state(through))
    backend.close(direct)
    backend.close(through)


def test_the_default_cache_belongs_to_one_session_and_goes_with_it(rng: np.random.Generator) -> None:
    """Also of the same model: two sessions do not see each other's tokens."""
    proto = model([sdpa(0)], "default")
    first, second = session(proto), session(proto)
    key = tokens(rng, 6)
    assert [first.run(None, feeds(key, key))[0].item() for _ in range(3)] == [0, 6, 12]
    assert second.run(None, feeds(key, key))[0].tolist() == [0]
    assert first.run(None, feeds(key, key, past_length=4))[0].tolist() == [4]
    assert first.run(None, feeds(key, key))[0].tolist() == [10]


def test_optional_inputs_may_be_absent(rng: np.random.Generator) -> None:
    nodes = [sdpa(0, is_causal=1)]
    full, short = session(model(nodes, "full")), session(without(model(nodes, "short"), "attn_mask", "head_sink"))
    key = tokens(rng, 9)
    wanted = {name: array for name, array in feeds(key, key).items() if array is not NOTHING}
    inputs = {name: wanted[name] for name in ("query", "key", "value")}
    np.testing.assert_array_equal(short.run(None, inputs)[1], full.run(None, feeds(key, key))[1])


@pytest.mark.parametrize(("element", "unit"), [(TensorProto.FLOAT16, 2**-11), (TensorProto.BFLOAT16, 2**-8)])
def test_half_precision_models_need_no_casts(rng: np.random.Generator, element: int, unit: float) -> None:
    """Within one rounding of the output of the f32 model on the rounded inputs: half a unit in the last place."""
    nodes = [sdpa(0), sdpa(1)]
    half, single = session(retyped(model(nodes, "half"), element)), session(model(nodes, "single"))
    assert {i.type for i in half.get_inputs()} == {"tensor(float16)" if unit < 2**-9 else "tensor(bfloat16)"}
    for count in (20, 1):
        inputs = feeds(tokens(rng, count), tokens(rng, count))
        inputs["attn_mask"] = np.where(rng.random((1, 1, count, 20 + (count == 1))) < 0.3, -np.inf, 0)
        rounded = {name: to_half(array.astype(np.float32), element) for name, array in inputs.items()}
        exact = single.run(None, {name: from_half(array, element) for name, array in rounded.items()})
        wrapped = {name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(a, element) for name, a in rounded.items()}
        outputs = half.run_with_ort_values(None, wrapped)
        for got, want in zip(outputs[1:], exact[1:], strict=True):
            assert got.element_type() == element
            # A fully masked row is NaN in both.
            np.testing.assert_allclose(from_half(to_bits(got), element), want, rtol=unit, atol=1e-7)


def to_half(array: np.ndarray, element: int) -> np.ndarray:
    if element == TensorProto.FLOAT16:
        return array.astype(np.float16).view(np.uint16)
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def from_half(bits: np.ndarray, element: int) -> np.ndarray:
    if element == TensorProto.FLOAT16:
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(value: ort.OrtValue) -> np.ndarray:
    import ctypes

    shape = value.shape()
    raw = (ctypes.c_uint16 * int(np.prod(shape))).from_address(value.data_ptr())
    return np.ctypeslib.as_array(raw).reshape(shape).copy()


def test_io_binding_reads_and_writes_in_place(rng: np.random.Generator) -> None:
    nodes = [sdpa(0)]
    bound, plain = session(model(nodes, "bound")), session(model(nodes, "plain"))
    key = tokens(rng, 12)
    output = np.full((1, 2, 12, 6), 7, np.float32)
    binding = bound.io_binding()
    for name, array in feeds(key, key).items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("out0", "cpu", 0, np.float32, output.shape, output.ctypes.data)
    binding.bind_output("past")
    bound.run_with_iobinding(binding)
    np.testing.assert_array_equal(output, plain.run(None, feeds(key, key))[1])


def test_io_binding_takes_inputs_with_a_default_as_ort_values_only() -> None:
    served = session(kivi.rewrite(tiny_decoder())[0])
    assert "past_length" not in [i.name for i in served.get_inputs()]
    inputs = {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1, 1]], "position_ids": [[0, 1, 2]]}
    expected = served.run(["logits"], inputs)[0]
    binding = served.io_binding()
    for name, values in inputs.items():
        binding.bind_cpu_input(name, np.array(values))
    binding.bind_output("logits")
    with pytest.raises(RuntimeError, match="Failed to find NodeArg with name: past_length"):
        binding.bind_cpu_input("past_length", np.array([0]))
    with pytest.raises(Exception, match="attn_mask: expected shape"):
        served.run_with_iobinding(binding)  # behind the 3 tokens that are there
    binding.bind_ortvalue_input("past_length", ort.OrtValue.ortvalue_from_numpy(np.array([0])))
    served.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], expected)


def test_onnxruntime_infers_the_shapes_of_the_nodes() -> None:
    proto = model([sdpa(0)], "shapes")
    inputs: dict[str, list[str | int | None]] = {
        "query": ["B", 8, "S", 6],
        "key": ["B", 2, "S", 6],
        "value": ["B", 2, "S", 10],
    }
    for name, dims in inputs.items():
        index = [i.name for i in proto.graph.input].index(name)
        proto.graph.input[index].CopyFrom(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
    shapes = {o.name: o.shape for o in session(proto).get_outputs()}
    assert shapes == {"past": [1], "out0": ["B", 8, "S", 10]}


def test_errors_are_onnxruntimes_own_with_our_message_and_leave_the_cache_as_it_was(
    backend: Backend, rng: np.random.Generator
) -> None:
    served = session(model([sdpa(0), sdpa(1)], "errors"))
    other = session(model([sdpa(0)], "another"))
    handle, closed = backend.new_cache(), backend.new_cache()
    backend.close(closed)
    key = tokens(rng, 9)
    good = feeds(key, key, cache_handle=handle)
    served.run(None, good)
    before = backend.export_state(handle)
    mask = np.zeros((1, 1, 9, 9), np.float32)
    cases = [
        (served, good | {"attn_mask": mask}, r"attn_mask: expected shape \(B=1, Hq=2, S=9, T=18\)"),
        (served, good | {"key": key[:, :1]}, r"key: expected shape \(B=1, Hkv=2, N=9, Dk=6\)"),
        (served, good | {"query": key[0]}, "query: expected shape"),
        (served, good | {"value": key[:, :, :8]}, "value: expected shape"),
        (served, feeds(key, key, cache_handle=handle, past_length=10), "past_length: expected -1 or 0 to 9"),
        (served, feeds(key, key, cache_handle=closed), "expected an open handle"),
        (served, feeds(key, key, cache_handle=2**62), "expected an open handle"),
        (
            served,
            good | {"past_length": np.zeros(2, np.int64)},
            "past_length: expected 1 number or 1, one for each row, got 2",
        ),
        (other, good, "expected model errors .* got another"),
    ]
    for which, inputs, message in cases:
        error = refusal(which, inputs)
        assert isinstance(error, CacheError)
        assert str(error).count("\n") == 0
        with pytest.raises(CacheError, match=message):
            raise error
        assert_same(backend.export_state(handle), before)
    past, *_ = served.run(None, good)
    assert past.tolist() == [9]
    assert backend.length(handle) == 18
    backend.close(handle)


@pytest.mark.parametrize(
    ("step_wire", "sdpa_wire", "kind", "message"),
    [
        ({"spec_version": 99}, {}, SpecMismatchError, "spec_version: expected 1 or 2, got 99"),
        ({"layers": 0}, {}, ConfigError, "layers: expected an integer from 1 to"),
        ({"model_id": None}, {}, ConfigError, "attribute model_id: missing"),
        ({}, {"slot": None}, ConfigError, "attribute slot: missing"),
        ({}, {"spec_version": 3}, SpecMismatchError, "spec_version: expected 1 or 2, got 3"),
        ({}, {"k_bits": 5}, ConfigError, "k_bits: expected one of 2, 4, 8, 32, got 5"),
        ({}, {"scale": "fast"}, ConfigError, "scale: expected float, got 'fast'"),
        ({}, {"kind": "both"}, ConfigError, "kind: expected one of self, cross"),
    ],
)
def test_nodes_of_another_spec_or_with_bad_attributes_are_refused_when_the_model_loads(
    step_wire: dict[str, Any], sdpa_wire: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(Exception, match="onnx_kivi") as caught:
        session(model([sdpa(0)], "wire", step_wire=step_wire, sdpa_wire=sdpa_wire))
    error = native.error_from(caught.value)
    assert type(error) is kind
    assert message in str(error)


def test_a_cancelled_run_leaves_the_cache_usable(backend: Backend, rng: np.random.Generator) -> None:
    """Termination is looked at between nodes: the run is given up with a part of the layers done."""
    layers = 40
    served = session(model([sdpa(i) for i in range(layers)], "cancel"))
    handle = backend.new_cache()
    key = tokens(rng, 600)
    good = feeds(key[:, :, :5], key[:, :, :5], cache_handle=handle)
    served.run(None, good)
    before = backend.export_state(handle)
    options = ort.RunOptions()
    outcome: list[str] = []

    def long_run() -> None:
        try:
            served.run(None, feeds(key, key, cache_handle=handle), options)
        except Exception as error:
            outcome.append(str(error))

    worker = threading.Thread(target=long_run)
    worker.start()
    time.sleep(0.005)
    options.terminate = True
    worker.join()
    assert "terminate" in outcome[0]
    assert_same(backend.export_state(handle), before)
    past, *_ = served.run(None, good)
    assert past.tolist() == [5]
    assert backend.length(handle) == 10
    backend.close(handle)


def test_concurrent_runs_on_one_session_with_their_own_handles_do_not_meet(
    backend: Backend, rng: np.random.Generator
) -> None:
    nodes = [sdpa(0), sdpa(1)]
    served = session(model(nodes, "concurrent"), threads=2)
    data = [tokens(rng, 40) for _ in range(4)]

    def generate(key: np.ndarray) -> int:
        handle = backend.new_cache()
        for i in range(40):
            served.run(None, feeds(key[:, :, i : i + 1], key[:, :, i : i + 1], cache_handle=handle))
        return handle

    with ThreadPoolExecutor(4) as pool:
        handles = list(pool.map(generate, data))
    for handle, key in zip(handles, data, strict=True):
        alone = backend.new_cache()
        run(backend, alone, nodes, key, key)
        assert backend.sealed_tokens(handle) == 36
        assert_same(backend.export_state(handle), backend.export_state(alone))
        backend.close(handle)
        backend.close(alone)


def test_two_runs_on_one_handle_end_in_a_clear_error_or_in_order(backend: Backend, rng: np.random.Generator) -> None:
    served = session(model([sdpa(i) for i in range(6)], "contended"), threads=1)
    handle = backend.new_cache()
    key = tokens(rng, 3)
    errors: list[CacheError] = []

    def work() -> None:
        for _ in range(60):
            try:
                served.run(None, feeds(key, key, cache_handle=handle))
            except Exception as failure:
                error = native.error_from(failure)
                assert isinstance(error, CacheError)
                errors.append(error)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work), pool.submit(work)]:
            done.result()
    assert all("give each of the runs its own cache" in str(e) for e in errors)
    assert backend.length(handle) == 3 * (120 - len(errors))
    backend.close(handle)


@pytest.mark.slow
def test_a_hundred_thousand_steps_leave_memory_flat(backend: Backend, rng: np.random.Generator) -> None:
    """Caches are made, filled past several sealed blocks and closed all along. Resident memory may drift by 8 MiB
    (allocators keep some) after the first tenth; the caches of that many steps would take over 1 GiB."""
    served = session(model([sdpa(0), sdpa(1)], "soak"))
    key = tokens(rng, 1, size=64)
    resident = []
    for _ in range(1000):
        handle = backend.new_cache()
        inputs = feeds(key, key, cache_handle=handle)
        for _ in range(100):
            served.run(None, inputs)
        assert backend.sealed_tokens(handle) > 90
        backend.close(handle)
        resident.append(resident_bytes())
    assert max(resident[100:]) - resident[100] < 8 << 20


def resident_bytes() -> int:
    from pathlib import Path

    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
