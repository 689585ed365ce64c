"""Building a changed model: new nodes and constants beside what stays of the old graph, dead parts removed.

Old nodes, initializers, metadata and functions are kept as they are, bit for bit: onnx_graphsurgeon, which would drop
node metadata and default-initializer inputs, sees only a skeleton of the graph and decides what is still needed and
in which order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx
from onnx import helper, numpy_helper

from ..arrays import IntArray
from ..errors import UnsupportedModelError
from .build import NewConstant, NewNode, NewPart
from .schemas import register_schemas
from .view import Graph, Model

AMessage = TypeVar("AMessage")


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What is to become of a model. `new_inputs` become inputs, one number or more, with these default initializers.

    removed_nodes: indices. floats_in, floats_out: float inputs without a default, and outputs, by name with their axes;
    they may take the place of removed ones. renamed_axes: input or output -> (axis, name), an axis whose size is no
    longer that of others of its old name. opset: domain and version of what `new` uses beside ai.onnx.
    """

    new: Sequence[NewPart]
    removed_nodes: Collection[int]
    removed_inputs: Collection[str]
    removed_outputs: Collection[str]
    new_inputs: Mapping[str, IntArray]
    floats_in: Mapping[str, Sequence[str]] = field(default_factory=dict)
    floats_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    renamed_axes: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    opset: tuple[str, int]
    least_ir_version: int

    @property
    def nodes(self) -> list[NewNode]:
        """The new nodes."""
        return [part for part in self.new if isinstance(part, NewNode)]

    @property
    def constants(self) -> list[NewConstant]:
        """The new constants."""
        return [part for part in self.new if isinstance(part, NewConstant)]

    def gone(self, graph: Graph) -> frozenset[str]:
        """Names of the tensors that are removed and that nothing new takes the place of."""
        made = {name for i in self.removed_nodes for name in graph.nodes[i].outputs if name}
        there = {*self.floats_in, *(name for node in self.nodes for name in node.outputs)}
        return frozenset({*made, *self.removed_inputs} - there)


@dataclass(frozen=True, slots=True)
class _Body:
    """The nodes of the changed model, in order, and what each reads from outside of its own subgraphs."""

    nodes: list[onnx.NodeProto]
    reads: list[tuple[str, ...]]


def apply(changes: Changes, graph: Graph, model: Model) -> None:
    """Change `model`, of which `graph` is the index. Raises UnsupportedModelError if nodes would read in a circle."""
    outputs = [o for o in model.graph.output if o.name not in changes.removed_outputs]
    outputs += _floats(changes.floats_out)
    body = _body(changes, graph, [o.name for o in outputs])
    replace_all(model.graph.node, body.nodes)
    replace_all(model.graph.output, outputs)
    _set_inputs(changes, graph, model)
    _set_initializers(changes, body, model)
    _set_annotations(changes, body, model)
    model.opset_import.append(helper.make_opsetid(*changes.opset))
    model.ir_version = max(model.ir_version, changes.least_ir_version)
    register_schemas()


def set_attribute(model: Model, ops: Collection[str], name: str, value: int | str) -> None:
    """Set an attribute of every node of these ops of our own domain."""
    for node in model.graph.node:
        if node.op_type in ops:
            for attribute in node.attribute:
                if attribute.name == name:
                    attribute.CopyFrom(helper.make_attribute(name, value))


def _body(changes: Changes, graph: Graph, outputs: Sequence[str]) -> _Body:
    """What the outputs need, in topological order."""
    old = [node for node in graph.nodes if node.index not in changes.removed_nodes]
    new = [node.proto() for node in changes.nodes]
    protos = [*(node.proto for node in old), *new]
    reads = [*((*node.inputs, *sorted(node.captured)) for node in old), *(tuple(node.input) for node in new)]
    order = needed(protos, reads, outputs)
    return _Body([protos[i] for i in order], [reads[i] for i in order])


def _set_inputs(changes: Changes, graph: Graph, model: Model) -> None:
    """Old inputs that stay, but for initializers that old IR versions list among them, and new ones behind them."""
    listed = {t.name for t in model.graph.initializer} - graph.inputs.keys()
    gone = {*changes.removed_inputs, *listed}
    new = (
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64, [f"{name}s"] * default.ndim)
        for name, default in changes.new_inputs.items()
    )
    stay = (i for i in model.graph.input if i.name not in gone)
    replace_all(model.graph.input, [*stay, *_floats(changes.floats_in), *new])
    for info in (*model.graph.input, *model.graph.output):
        if info.name in changes.renamed_axes:
            axis, symbol = changes.renamed_axes[info.name]
            info.type.tensor_type.shape.dim[axis].dim_param = symbol


def _floats(axes: Mapping[str, Sequence[str]]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, symbols) for name, symbols in axes.items()]


def _set_initializers(changes: Changes, body: _Body, model: Model) -> None:
    """Old and new ones that something reads."""
    initializers = model.graph.initializer
    initializers.extend(constant.proto() for constant in changes.constants)
    initializers.extend(numpy_helper.from_array(value, name) for name, value in changes.new_inputs.items())
    used = _used(body, model)
    for i in reversed(range(len(initializers))):
        if initializers[i].name not in used:
            del initializers[i]


def _set_annotations(changes: Changes, body: _Body, model: Model) -> None:
    """What is noted of tensors that are still made, and made as before."""
    made = {name for node in body.nodes for name in node.output}
    stays = made - {name for node in changes.nodes for name in node.outputs}
    known = made | _used(body, model)
    graph = model.graph
    replace_all(graph.value_info, [v for v in graph.value_info if v.name in stays])
    replace_all(graph.quantization_annotation, [q for q in graph.quantization_annotation if q.tensor_name in known])


def _used(body: _Body, model: Model) -> set[str]:
    named = {value.name for value in (*model.graph.input, *model.graph.output)}
    return named.union(*body.reads)


def replace_all(repeated: Any, messages: Sequence[Any]) -> None:
    """Have copies of these messages, which may lie in it already, in a repeated field."""
    copies = [copied(message) for message in messages]
    del repeated[:]
    repeated.extend(copies)


def copied(message: AMessage) -> AMessage:
    """A copy of a model, or of a part of one."""
    copy: Any = type(message)()
    copy.CopyFrom(message)
    same: AMessage = copy
    return same


def needed(protos: Sequence[onnx.NodeProto], reads: Sequence[Collection[str]], outputs: Sequence[str]) -> list[int]:
    """Indices of the nodes that the outputs need, in topological order."""
    import onnx_graphsurgeon as gs

    tensors: dict[str, gs.Variable] = {}

    def variables(names: Collection[str]) -> list[gs.Variable]:
        return [tensors.setdefault(name, gs.Variable(name)) for name in names if name]

    nodes = [
        gs.Node(op=proto.op_type, name=str(i), inputs=variables(read), outputs=variables(proto.output))
        for i, (proto, read) in enumerate(zip(protos, reads, strict=True))
    ]
    skeleton = gs.Graph(nodes=nodes, outputs=variables(outputs))
    try:
        skeleton.cleanup().toposort()
    except Exception as error:  # graphsurgeon raises its own exception for a cycle
        raise UnsupportedModelError(f"the rewritten graph can't be put in order: {error}") from error
    return [int(node.name) for node in skeleton.nodes]
