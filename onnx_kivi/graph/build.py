"""The one builder of nodes: each call adds a node or a constant and gives the name of what it makes.

What was built are plain values, equal ones are kept once. How tensors are called is a policy, `Names`. Spellings
follow the opset (ONNX operator specification: from 13 on axes and sizes are inputs, before they were attributes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .elements import ELEMENT_CODES
from .view import Node

PREFIX = "onnx_kivi"
AXES_ARE_INPUTS = 13
Number = int | float


@dataclass(frozen=True, slots=True)
class NewNode:
    """A node that is yet to be put into a model."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: tuple[tuple[str, Any], ...] = ()
    domain: str = ""
    name: str = ""

    def proto(self) -> onnx.NodeProto:
        """The node as onnx has it."""
        return helper.make_node(
            self.op, self.inputs, self.outputs, name=self.name, domain=self.domain or None, **dict(self.attributes)
        )


@dataclass(frozen=True, slots=True)
class NewConstant:
    """An initializer that is yet to be put into a model: a list, or a plain number, which has no axes."""

    name: str
    values: Number | tuple[Number, ...]
    element: str

    def proto(self) -> onnx.TensorProto:
        """The tensor as onnx has it; a number below the element's range is -inf."""
        with np.errstate(over="ignore"):
            array = np.array(self.values, helper.tensor_dtype_to_np_dtype(ELEMENT_CODES[self.element]))
        return numpy_helper.from_array(array, self.name)


NewPart = NewNode | NewConstant


class Names(Protocol):
    """How a builder calls what it makes."""

    def outputs(self, op: str, stem: str, content: object, count: int) -> tuple[str, ...]:
        """Names of a node's outputs; `content` is all that the node is made of."""

    def node(self, op: str, outputs: tuple[str, ...]) -> str:
        """Name of a node with these outputs."""

    def constant(self, values: Number | tuple[Number, ...], element: str) -> str:
        """Name of a constant."""


class HashedNames:
    """Names after what computes a tensor: the same computation has one name wherever it is built."""

    def outputs(self, op: str, stem: str, content: object, count: int) -> tuple[str, ...]:
        """See Names."""
        base = f"{PREFIX}/{(stem or op).lower()}.{_digest(content)}"
        return tuple(f"{base}.{i}" for i in range(count)) if count > 1 else (base,)

    def node(self, op: str, outputs: tuple[str, ...]) -> str:
        """See Names."""
        return f"{outputs[0]}/{op}"

    def constant(self, values: Number | tuple[Number, ...], element: str) -> str:
        """See Names."""
        return f"{PREFIX}/constant.{element}.{_digest(values)}"


class FreeNames(HashedNames):
    """Names after the operator, numbered, that are not `taken`; constants by their values."""

    def __init__(self, taken: Collection[str]) -> None:
        self._taken = set(taken)

    def outputs(self, op: str, stem: str, content: object, count: int) -> tuple[str, ...]:  # noqa: ARG002
        """See Names."""
        return tuple(self.tensor(stem or op.lower()) for _ in range(count))

    def tensor(self, stem: str) -> str:
        """A name that is not in use."""
        name, n = f"{PREFIX}/{stem}", 1
        while name in self._taken:
            n += 1
            name = f"{PREFIX}/{stem}.{n}"
        self._taken.add(name)
        return name


class Builder:
    """Collects new nodes and constants for a model of this opset; every method returns the name of a tensor."""

    def __init__(self, opset: int, names: Names) -> None:
        self.opset = opset
        self._names = names
        self._parts: dict[NewPart, None] = {}

    @property
    def parts(self) -> tuple[NewPart, ...]:
        """What was built, in order."""
        return tuple(self._parts)

    def take(self, parts: Sequence[NewPart], renamed: Mapping[str, str]) -> None:
        """Add what another builder built, with inputs renamed."""
        for part in parts:
            self._parts[_renamed(part, renamed)] = None

    def nodes(
        self,
        op: str,
        /,
        *inputs: str,
        outputs: int | Sequence[str],
        domain: str = "",
        stem: str = "",
        **attributes: Any,
    ) -> tuple[str, ...]:
        """A node with several outputs, so many or of these names; names begin with `stem`."""
        given = tuple((name, _frozen(value)) for name, value in sorted(attributes.items()))
        if isinstance(outputs, int):
            made = self._names.outputs(op, stem, (domain, inputs, given), outputs)
        else:
            made = tuple(outputs)
        self._parts[NewNode(op, inputs, made, given, domain, self._names.node(op, made))] = None
        return made

    def node(
        self, op: str, /, *inputs: str, output: str = "", domain: str = "", stem: str = "", **attributes: Any
    ) -> str:
        """A node with one output, called `output` if that is given."""
        outputs = (output,) if output else 1
        (name,) = self.nodes(op, *inputs, outputs=outputs, domain=domain, stem=stem, **attributes)
        return name

    def copy(self, node: Node, inputs: tuple[str, ...]) -> None:
        """A node of the model once more, reading these tensors; the old one has to go."""
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.proto.attribute}
        attributes = tuple((name, _frozen(value)) for name, value in sorted(given.items()))
        domain = node.proto.domain
        self._parts[NewNode(node.proto.op_type, inputs, node.outputs, attributes, domain, node.name)] = None

    def rename_last(self, output: str) -> None:
        """Have the output of the last node under another name."""
        last, _ = self._parts.popitem()
        assert isinstance(last, NewNode)
        self._parts[replace(last, outputs=(output,))] = None

    def constant(self, values: Number | Sequence[Number], element: str) -> str:
        """A list, or a number without axes, of this type."""
        frozen = _frozen(values)
        name = self._names.constant(frozen, element)
        self._parts[NewConstant(name, frozen, element)] = None
        return name

    def ints(self, *values: int) -> str:
        """A list of int64."""
        return self.constant(values, "int64")

    def floats(self, *values: float) -> str:
        """A list of float32."""
        return self.constant(values, "float")

    def scalar(self, value: Number) -> str:
        """An int64 or float32 without axes."""
        return self.constant(value, "float" if isinstance(value, float) else "int64")

    def cast(self, tensor: str, element: str) -> str:
        """Cast to an element type."""
        return self.node("Cast", tensor, to=ELEMENT_CODES[element])

    def unsqueeze(self, tensor: str, *axes: int) -> str:
        """Insert axes of size 1."""
        return self._with_axes("Unsqueeze", tensor, axes)

    def squeeze(self, tensor: str, *axes: int) -> str:
        """Remove axes of size 1."""
        return self._with_axes("Squeeze", tensor, axes)

    def split(self, tensor: str, axis: int, *sizes: int) -> tuple[str, ...]:
        """Cut an axis into parts of these sizes."""
        if self.opset >= AXES_ARE_INPUTS:
            return self.nodes("Split", tensor, self.ints(*sizes), outputs=len(sizes), axis=axis)
        return self.nodes("Split", tensor, outputs=len(sizes), axis=axis, split=sizes)

    def _with_axes(self, op: str, tensor: str, axes: tuple[int, ...]) -> str:
        if self.opset >= AXES_ARE_INPUTS:
            return self.node(op, tensor, self.ints(*axes))
        return self.node(op, tensor, axes=axes)


def _renamed(part: NewPart, names: Mapping[str, str]) -> NewPart:
    if isinstance(part, NewConstant):
        return part
    return replace(part, inputs=tuple(names.get(name, name) for name in part.inputs))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _digest(content: object) -> str:
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
