"""A read-only index of a model's main graph: nodes, who makes and who reads each tensor, constants.

Names resolve as ONNX says: a tensor that a node's subgraph captures counts as read by that node. Building a `Graph`
checks that the graph is well formed (every tensor made once, before it is read) and raises UnsupportedModelError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from ..arrays import Array
from ..errors import UnsupportedModelError

Model = onnx.ModelProto

MAX_CONSTANT = 1 << 22
MAX_RANK = 32
INITIALIZERS_ARE_CONSTANT_FROM_IR = 4


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One node; `op` carries the domain unless it is ai.onnx ("com.microsoft.FusedMatMul")."""

    index: int
    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    captured: frozenset[str]
    proto: onnx.NodeProto

    def input(self, i: int) -> str:
        """Name of input i, "" if it is absent."""
        return self.inputs[i] if i < len(self.inputs) else ""

    def attr(self, name: str, default: Any = None) -> Any:
        """Value of an attribute, strings as str."""
        for a in self.proto.attribute:
            if a.name == name:
                value = onnx.helper.get_attribute_value(a)
                return value.decode(errors="replace") if isinstance(value, bytes) else value
        return default

    def whole(self, name: str, default: int | None = None) -> int:
        """Value of an integer attribute. Raises UnsupportedModelError for another type, or none without a default."""
        value = self.attr(name, default)
        if not isinstance(value, int):
            raise UnsupportedModelError(f"{self}: attribute {name!r}: expected an integer, got {value!r}")
        return value

    def flag(self, name: str, default: int = 0) -> bool:
        """Value of an attribute that is 0 or 1; kernels read some others as 0. Raises UnsupportedModelError."""
        value = self.whole(name, default)
        if value not in (0, 1):
            raise UnsupportedModelError(f"{self}: attribute {name!r}: expected 0 or 1, got {value}")
        return value == 1

    def count(self, name: str) -> int:
        """Value of an attribute that counts heads, say. Raises UnsupportedModelError unless it is 1 or more."""
        value = self.whole(name)
        if value < 1:
            raise UnsupportedModelError(f"{self}: attribute {name!r}: expected 1 or more, got {value}")
        return value

    def real(self, name: str, default: float) -> float:
        """Value of a float attribute. Raises UnsupportedModelError for another type."""
        value = self.attr(name, default)
        if not isinstance(value, float):
            raise UnsupportedModelError(f"{self}: attribute {name!r}: expected a float, got {value!r}")
        return value

    def __str__(self) -> str:
        return f"{self.op} {self.name!r}"


class Graph:
    """The main graph of `model`; see the module's docstring."""

    def __init__(self, model: Model) -> None:
        graph = model.graph
        self.model = model
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        self.initializers: Mapping[str, onnx.TensorProto] = {t.name: t for t in graph.initializer}
        overridable = model.ir_version >= INITIALIZERS_ARE_CONSTANT_FROM_IR
        self.inputs: Mapping[str, onnx.ValueInfoProto] = {
            i.name: i for i in graph.input if overridable or i.name not in self.initializers
        }
        self.outputs: tuple[str, ...] = tuple(o.name for o in graph.output)
        self.nodes: tuple[Node, ...] = tuple(_node(i, n) for i, n in enumerate(graph.node))
        self._producers: dict[str, Node] = {}
        self._consumers: dict[str, list[Node]] = {}
        known = {*self.inputs, *self.initializers, *(t.values.name for t in graph.sparse_initializer), ""}
        for node in self.nodes:
            self._add(node, known)
        if missing := [name for name in self.outputs if name not in known]:
            raise UnsupportedModelError(f"graph output {missing[0]!r}: expected a tensor of the graph, got none")

    def _add(self, node: Node, known: set[str]) -> None:
        """Index a node that reads `known` tensors, and add to them what it makes."""
        _check(node, self.opset)
        for name in dict.fromkeys((*node.inputs, *sorted(node.captured))):
            if name not in known:
                raise UnsupportedModelError(f"{node}: expected inputs made by an earlier node, got {name!r}")
            self._consumers.setdefault(name, []).append(node)
        for name in filter(None, node.outputs):
            if name in known:
                raise UnsupportedModelError(f"{node}: expected a new name for each output, got {name!r} again")
            known.add(name)
            self._producers[name] = node

    def producer(self, tensor: str) -> Node | None:
        """The node that makes a tensor; None for inputs and initializers."""
        return self._producers.get(tensor)

    def consumers(self, tensor: str) -> tuple[Node, ...]:
        """The nodes that read a tensor, in graph order."""
        return tuple(self._consumers.get(tensor, ()))

    def constant(self, tensor: str) -> Array | None:
        """Value of an initializer or Constant of moderate size that lies in the file itself, else None."""
        node = self.producer(tensor)
        if node is not None:
            return _constant_node(node) if node.op == "Constant" else None
        if tensor in self.inputs or tensor not in self.initializers:
            return None
        return _array(self.initializers[tensor])

    def constant_attribute(self, node: Node, name: str) -> Array | None:
        """Value of a tensor attribute, None if it is absent."""
        tensor = node.attr(name)
        return None if tensor is None else _array(tensor)

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        """Every name in use at the top level."""
        return frozenset({*self.inputs, *self.initializers, *self._producers})


def _node(index: int, proto: onnx.NodeProto) -> Node:
    domain = "" if proto.domain in ("", "ai.onnx") else f"{proto.domain}."
    return Node(
        index=index,
        op=domain + proto.op_type,
        name=proto.name or (proto.output[0] if proto.output else f"#{index}"),
        inputs=tuple(proto.input),
        outputs=tuple(proto.output),
        captured=frozenset(name for graph in subgraphs(proto) for name in outer_reads(graph)),
        proto=proto,
    )


def _check(node: Node, opset: int) -> None:
    """Raise UnsupportedModelError for a node of ai.onnx whose inputs or attributes its schema does not allow."""
    if "." in node.op or not onnx.defs.has(node.op, opset):
        return
    schema = onnx.defs.get_schema(node.op, opset)
    for what, count, least, most in (
        ("inputs", len(node.inputs), schema.min_input, schema.max_input),
        ("outputs", len(node.outputs), schema.min_output, schema.max_output),
    ):
        if not least <= count <= most:
            raise UnsupportedModelError(f"{node}: expected {least} to {most} {what}, got {count}")
    for attribute in node.proto.attribute:
        declared = schema.attributes.get(attribute.name)
        if declared is not None and attribute.type != declared.type.value:  # type: ignore[attr-defined]
            raise UnsupportedModelError(
                f"{node}: attribute {attribute.name!r} is not of the type that its operator expects"
            )


def subgraphs(proto: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    for a in proto.attribute:
        if a.type == onnx.AttributeProto.GRAPH:
            yield a.g
        elif a.type == onnx.AttributeProto.GRAPHS:
            yield from a.graphs


def outer_reads(graph: onnx.GraphProto) -> Iterator[str]:
    """The tensors from outside that a node's graph reads."""
    local = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    for node in graph.node:
        inner = (name for each in subgraphs(node) for name in outer_reads(each))
        yield from (name for name in (*node.input, *inner) if name and name not in local)
        local.update(node.output)
    yield from (o.name for o in graph.output if o.name not in local)


def elements(tensor: onnx.TensorProto) -> int | None:
    """How many elements a tensor has; None for dimensions that no array has."""
    dims = tensor.dims
    return None if len(dims) > MAX_RANK or any(d < 0 for d in dims) else math.prod(dims)


def _array(tensor: onnx.TensorProto) -> Array | None:
    count = None if tensor.data_location == onnx.TensorProto.EXTERNAL else elements(tensor)
    if count is None or count > MAX_CONSTANT:
        return None
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except Exception as error:  # what to_array raises for a malformed tensor is not specified
        raise UnsupportedModelError(f"tensor {tensor.name!r}: expected well-formed data, got: {error}") from error


def _constant_node(node: Node) -> Array | None:
    for a in node.proto.attribute:
        if a.name == "value":
            return _array(a.t)
        if a.name in ("value_int", "value_ints"):
            return np.asarray(onnx.helper.get_attribute_value(a), dtype=np.int64)
        if a.name in ("value_float", "value_floats"):
            return np.asarray(onnx.helper.get_attribute_value(a), dtype=np.float32)
    return None
