"""Building a changed model: new nodes and constants beside what stays of the old graph, dead parts removed.

Old nodes, initializers, metadata and functions are kept as they are, bit for bit: onnx_graphsurgeon, which would drop
node metadata and default-initializer inputs, sees only a skeleton of the graph and decides what is still needed and
in which order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ..errors import UnsupportedModelError
from .external import entry, external_file
from .schemas import register_schemas
from .view import Graph, Model

PREFIX = "onnx_kivi"
HASHED_BYTES = 4096
UNSQUEEZE_AXES_INPUT = 13


class Edit:
    """Collects new nodes and constants for one graph; names are made unique."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self._taken = set(graph.tensor_names)

    def name(self, stem: str) -> str:
        """A tensor name of our own that is not in use."""
        name, n = f"{PREFIX}/{stem}", 1
        while name in self._taken:
            n += 1
            name = f"{PREFIX}/{stem}.{n}"
        self._taken.add(name)
        return name

    def constant(self, array: npt.NDArray[Any]) -> str:
        """Name of an initializer with this value; equal ones are shared."""
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:8]
        name = f"{PREFIX}/constant.{array.dtype}.{'x'.join(map(str, array.shape))}.{digest}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def named_constant(self, name: str, array: npt.NDArray[Any]) -> None:
        """An initializer under a given new name."""
        self.constants[name] = numpy_helper.from_array(array, name)

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant(np.array(values, np.int64))

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: Sequence[str] = (),
        domain: str = "",
        stem: str = "",
    ) -> str:
        """Add a node; returns its first output, which gets a new name unless `outputs` are given."""
        outputs = tuple(outputs) or (self.name(stem or op.lower()),)
        proto = helper.make_node(op, inputs, outputs, name=f"{outputs[0]}/{op}", domain=domain, **(attributes or {}))
        self.nodes.append(proto)
        return outputs[0]

    def rename_last(self, output: str) -> None:
        """Have the output of the last node under another name."""
        self.nodes[-1].output[0] = output

    def unsqueeze(self, tensor: str, *axes: int) -> str:
        """Insert axes of size 1, in the spelling of the model's opset."""
        if self.graph.opset >= UNSQUEEZE_AXES_INPUT:
            return self.node("Unsqueeze", [tensor, self.ints(*axes)])
        return self.node("Unsqueeze", [tensor], {"axes": list(axes)})

    def squeeze(self, tensor: str, *axes: int) -> str:
        """Remove axes of size 1, in the spelling of the model's opset."""
        if self.graph.opset >= UNSQUEEZE_AXES_INPUT:
            return self.node("Squeeze", [tensor, self.ints(*axes)])
        return self.node("Squeeze", [tensor], {"axes": list(axes)})


def apply(
    edit: Edit,
    model: Model,
    *,
    removed_nodes: Collection[int],
    removed_inputs: Collection[str],
    removed_outputs: Collection[str],
    new_inputs: Mapping[str, npt.NDArray[np.int64]],
    renamed_axes: Mapping[str, tuple[int, str]],
    opset: tuple[str, int],
    least_ir_version: int,
) -> None:
    """Change `model`, whose graph `edit` was made for. `new_inputs` become inputs with these default initializers.

    renamed_axes: input -> (axis, name), an axis whose size is no longer that of others of its old name.
    """
    graph = model.graph
    legacy = {t.name for t in graph.initializer} - edit.graph.inputs.keys()
    old = [n for n in edit.graph.nodes if n.index not in removed_nodes]
    protos = [*(n.proto for n in old), *edit.nodes]
    captured = [*(n.captured for n in old), *(frozenset[str]() for _ in edit.nodes)]
    outputs = [o for o in graph.output if o.name not in removed_outputs]
    order = _needed(protos, captured, [o.name for o in outputs])
    _replace(graph.node, [_copy(protos[i]) for i in order])
    _replace(graph.output, [_copy(o) for o in outputs])
    kept = [i for i in graph.input if i.name not in removed_inputs and i.name not in legacy]
    values = [helper.make_tensor_value_info(n, onnx.TensorProto.INT64, list(v.shape)) for n, v in new_inputs.items()]
    _replace(graph.input, [*(_copy(i) for i in kept), *values])
    for value in graph.input:
        if value.name in renamed_axes:
            axis, symbol = renamed_axes[value.name]
            value.type.tensor_type.shape.dim[axis].dim_param = symbol
    graph.initializer.extend(edit.constants.values())
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in new_inputs.items())
    used = {name for i in order for name in (*protos[i].input, *captured[i])} | {o.name for o in outputs}
    used |= {i.name for i in graph.input}
    for i in reversed(range(len(graph.initializer))):
        if graph.initializer[i].name not in used:
            del graph.initializer[i]
    made = {name for i in order for name in protos[i].output}
    stays = made - {name for n in edit.nodes for name in n.output}
    _replace(graph.value_info, [_copy(v) for v in graph.value_info if v.name in stays])
    _replace(
        graph.quantization_annotation, [_copy(q) for q in graph.quantization_annotation if q.tensor_name in made | used]
    )
    model.opset_import.append(helper.make_opsetid(*opset))
    model.ir_version = max(model.ir_version, least_ir_version)
    register_schemas()


def set_attribute(model: Model, op: str, name: str, value: int | str) -> None:
    """Set an attribute of every node of an op of our own domain."""
    for node in model.graph.node:
        if node.op_type == op:
            for attribute in node.attribute:
                if attribute.name == name:
                    attribute.CopyFrom(helper.make_attribute(name, value))


def _copy(proto: Any) -> Any:
    new = type(proto)()
    new.CopyFrom(proto)
    return new


def _replace(field: Any, items: Sequence[Any]) -> None:
    del field[:]
    field.extend(items)


def _needed(protos: Sequence[onnx.NodeProto], captured: Sequence[Collection[str]], outputs: Sequence[str]) -> list[int]:
    """Indices of the nodes that the outputs need, in topological order."""
    import onnx_graphsurgeon as gs

    tensors: dict[str, gs.Variable] = {}

    def variable(name: str) -> gs.Variable:
        return tensors.setdefault(name, gs.Variable(name))

    skeleton = gs.Graph(
        nodes=[
            gs.Node(
                op=p.op_type,
                name=str(i),
                inputs=[variable(n) for n in (*p.input, *sorted(c)) if n],
                outputs=[variable(n) for n in p.output if n],
            )
            for i, (p, c) in enumerate(zip(protos, captured, strict=True))
        ],
        outputs=[variable(n) for n in outputs],
    )
    try:
        skeleton.cleanup().toposort()
    except Exception as error:  # graphsurgeon raises its own exception for a cycle
        raise UnsupportedModelError(f"the rewritten graph can't be put in order: {error}") from error
    return [int(node.name) for node in skeleton.nodes]


def fingerprint(model: Model, *parts: str) -> str:
    """A hash of the graph and its weights that does not depend on where they lie; external ones count by their head."""
    digest = hashlib.sha256(repr(parts).encode())
    graph = model.graph
    for message in (*graph.node, *graph.input, *graph.output, *model.opset_import):
        digest.update(message.SerializeToString(deterministic=True))
    for tensor in graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            digest.update(_head(tensor))
        else:
            digest.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()[:32]


def _head(tensor: onnx.TensorProto) -> bytes:
    length = entry(tensor, "length")
    try:
        with external_file(tensor).open("rb") as file:
            file.seek(int(entry(tensor, "offset") or 0))
            return length.encode() + file.read(min(HASHED_BYTES, int(length or HASHED_BYTES)))
    except (OSError, ValueError):
        return length.encode()
