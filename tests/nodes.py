"""Models that consist of the ops and nothing else, built from the spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from onnx_kivi import spec
from onnx_kivi.runtime import python_host as host
from onnx_kivi.spec_types import OpSpec

STEPS = {1: spec.KV_CACHE_STEP, 2: spec.KV_CACHE_STEP_V2}
SDPAS = {1: spec.QUANTIZED_KV_SDPA, 2: spec.QUANTIZED_KV_SDPA_V2}
ELEMENTS = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64}


def model(
    nodes: Sequence[spec.SdpaAttributes],
    model_id: str,
    *,
    step_wire: Mapping[str, Any] | None = None,
    sdpa_wire: Mapping[str, Any] | None = None,
    version: int = 1,
    ghost_wire: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """A model that feeds the same tensors to all `nodes`, with outputs past, (rows,) out0, out1, ...

    rows are the past lengths of the rows, from `version` 2 on. The wire mappings overwrite attributes as they are
    written in the file; None leaves one out. ghost_wire, if not None: with ghost I/O, whose inputs come first, and
    whose outputs present_key and present_value last.
    """
    step, sdpa = STEPS[version], SDPAS[version]
    control = {i.name: spec.CONTROL_INPUTS[i.name] for i in step.inputs}
    tensors = [t for t in sdpa.inputs if t.name != "step"]
    inputs = [helper.make_tensor_value_info(t.name, ELEMENTS[t.element], None) for t in tensors]
    inputs += [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in control]
    defaults = [helper.make_tensor(name, TensorProto.INT64, [1], [value]) for name, value in control.items()]
    attributes = spec.StepAttributes(model_id=model_id, layers=len(nodes), spec_version=version).to_wire()
    past = ["past", "rows"][:version]
    proto_nodes = [_node(step, [*past, "ticket"], list(control), attributes, step_wire)]
    outputs = [helper.make_tensor_value_info(name, TensorProto.INT64, None) for name in past]
    for i, node in enumerate(nodes):
        proto_nodes.append(_node(sdpa, [f"out{i}"], [t.name for t in tensors] + ["ticket"], node.to_wire(), sdpa_wire))
        outputs.append(helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, None))
    if ghost_wire is not None:
        _add_ghosts(proto_nodes, inputs, outputs, ghost_wire, model_id)
    graph = helper.make_graph(proto_nodes, "nodes", inputs, outputs, defaults)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(spec.DOMAIN, spec.OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=spec.MIN_IR_VERSION)


def _add_ghosts(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    wire: Mapping[str, Any],
    model_id: str,
) -> None:
    attributes = spec.GhostAttributes(model_id=model_id).to_wire()
    carried = [t.name for t in spec.GHOSTS]
    controls = [i.name for i in spec.CACHE_OPEN.inputs[:2]]
    opened = ["opened_handle", "opened_length"]
    nodes[0].input[:2] = opened
    nodes.insert(0, _node(spec.CACHE_OPEN, opened, [*controls, *carried], attributes, wire))
    present = [t.name for t in spec.CACHE_STAMP.outputs]
    nodes.append(_node(spec.CACHE_STAMP, present, [controls[0], "ticket", *carried], attributes, wire))
    inputs[:0] = [helper.make_tensor_value_info(t.name, ELEMENTS[t.element], None) for t in spec.GHOSTS]
    outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in present]


def session(model_proto: onnx.ModelProto, backend: str) -> ort.InferenceSession:
    """A plain onnxruntime session, one thread, served by the Python host."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    host.register(options, backend)
    return ort.InferenceSession(model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds(
    key: npt.NDArray[np.float32],
    value: npt.NDArray[np.float32],
    *,
    q_heads: int | None = None,
    **control: int | Sequence[int],
) -> dict[str, npt.NDArray[Any]]:
    """Inputs of one run: no mask, no head sink, keys (repeated over query heads) as queries."""
    repeats = (q_heads or key.shape[1]) // key.shape[1]
    none = np.zeros((0,), np.float32)
    tensors = {"query": np.repeat(key, repeats, 1), "key": key, "value": value, "attn_mask": none, "head_sink": none}
    return tensors | {name: np.atleast_1d(np.array(numbers, np.int64)) for name, numbers in control.items()}


def _node(
    op: OpSpec, outputs: list[str], inputs: list[str], wire: dict[str, Any], changes: Mapping[str, Any] | None
) -> onnx.NodeProto:
    attributes = {name: value for name, value in (wire | dict(changes or {})).items() if value is not None}
    return helper.make_node(op.name, inputs, outputs, domain=spec.DOMAIN, name=outputs[0], **attributes)


def native_session(proto: onnx.ModelProto) -> ort.InferenceSession:
    """A plain session, served by the native host."""
    from onnx_kivi.runtime import native

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    native.register(options)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
