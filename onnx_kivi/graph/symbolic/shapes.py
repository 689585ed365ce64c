"""Symbolic shapes, element types and small integer values of every tensor of a graph, by abstract interpretation.

Sizes are ints or `Dim` polynomials; what can't be expressed becomes a symbol of its own, named after the tensor and
axis that define it, so equal symbols are equal sizes on every input the model accepts. Dimensions that an operator
forces to be equal (Concat's other axes) are unified. Sources: the ONNX operator specification; operators without a
rule here go through onnx's own node inference.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import shape_inference

from ..view import Graph, Node
from .abstract import AbstractValue, Sizes, UnknownError, Values
from .dims import Dim, substitute, symbol
from .shape_rules import BOOL_OPERATORS, ELEMENT_SOURCES, SHAPE_RULES
from .value_rules import MAX_VALUES, VALUE_RULES

MAX_PASSES = 4
MAX_SYMBOLIC_VALUES = 8
# What rules raise for a node that no operator's specification allows: one about which nothing is known.
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
VALUE_TYPES = (
    onnx.TensorProto.INT64,
    onnx.TensorProto.INT32,
    onnx.TensorProto.BOOL,
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)

Shape = Sizes


class Source(NamedTuple):
    """Where a symbol can be read at run time: the size of an axis, or an element of a flat integer tensor."""

    tensor: str
    place: int
    is_size: bool


class Equation(NamedTuple):
    """Two sizes that the model forces to be equal."""

    left: int | Dim
    right: int | Dim


@dataclass(frozen=True)
class Shapes:
    """What is known of each tensor. `sources` lists, for each symbol, every place that shows it, in graph order."""

    operands: Mapping[str, AbstractValue]
    sources: Mapping[str, tuple[Source, ...]]

    def shape(self, tensor: str) -> Shape | None:
        """Sizes of a tensor; None if its rank is unknown."""
        return self.operands[tensor].shape if tensor in self.operands else None

    def rank(self, tensor: str) -> int | None:
        """Number of axes, if known."""
        shape = self.shape(tensor)
        return None if shape is None else len(shape)

    def element(self, tensor: str) -> int:
        """onnx.TensorProto element type; 0 if unknown."""
        return self.operands[tensor].element if tensor in self.operands else 0

    def value(self, tensor: str) -> Values | None:
        """Value of a small tensor as an object array of numbers and sizes, if known."""
        return self.operands[tensor].value if tensor in self.operands else None

    def scalar(self, tensor: str) -> float | None:
        """Value of a one-element tensor, if it is a known number."""
        value = self.value(tensor)
        if value is None or value.size != 1 or isinstance(value.item(), Dim):
            return None
        return float(value.item())


def infer_shapes(graph: Graph, inputs: Mapping[str, Shape] | None = None) -> Shapes:
    """Interpret the whole graph; `inputs` gives shapes that graph inputs have beyond what they declare."""
    equal: dict[str, int | Dim] = {}
    for _ in range(MAX_PASSES):
        run = _Pass(graph, inputs or {}, equal)
        found = run.solve()
        if not found:
            break
        equal = {name: substitute(size, found) for name, size in equal.items()} | found
    return Shapes(run.operands, {name: tuple(places) for name, places in run.sources.items()})


class _Pass:
    """One sweep over the graph under the equalities known so far."""

    def __init__(self, graph: Graph, inputs: Mapping[str, Shape], equal: Mapping[str, int | Dim]) -> None:
        self.graph = graph
        self.equal = equal
        self.operands: dict[str, AbstractValue] = {}
        self.sources: dict[str, list[Source]] = {}
        self.equations: list[Equation] = []
        self._names: dict[Dim, str] = {}
        self._sizes: dict[str, Dim] = {}
        for name, info in graph.inputs.items():
            self._add(name, self._declared(info, inputs.get(name)))
        for name, tensor in graph.initializers.items():
            if name not in graph.inputs:
                self._add(name, AbstractValue(tensor.data_type, tuple(tensor.dims), self._constant(name)))
        for node in graph.nodes:
            for name, operand in zip(node.outputs, self._outputs(node), strict=True):
                if name:
                    self._add(name, operand)

    def solve(self) -> dict[str, int | Dim]:
        """New symbol -> size equalities; symbols that graph inputs declare are kept, others give way to them."""
        first = {name: i for i, name in enumerate(self.sources)}
        found: dict[str, int | Dim] = {}
        for equation in self.equations:
            left, right = (substitute(side, found) for side in equation)
            names = [s.name for s in (left, right) if isinstance(s, Dim) and s.name is not None]
            if left == right or not names:
                continue
            gone = max(names, key=lambda name: first.get(name, len(first)))
            other = right if left == symbol(gone) else left
            if isinstance(other, Dim) and gone in other.symbols:
                continue
            new = {gone: other}
            found = {name: substitute(size, new) for name, size in found.items()} | new
        return found

    def _add(self, name: str, operand: AbstractValue) -> None:
        self.operands[name] = operand
        for axis, size in enumerate(operand.shape or ()):
            if isinstance(size, Dim) and size.name is not None:
                self.sources.setdefault(size.name, []).append(Source(name, axis, True))
        if operand.value is not None and operand.value.ndim <= 1:
            for i, size in enumerate(operand.value.flat):
                if isinstance(size, Dim) and size.name is not None:
                    self.sources.setdefault(size.name, []).append(Source(name, i, False))

    def _fresh(self, name: str) -> int | Dim:
        return self.equal.get(name, symbol(name))

    def _declared(self, info: onnx.ValueInfoProto, given: Shape | None) -> AbstractValue:
        tensor = info.type.tensor_type
        if given is not None:
            return AbstractValue(
                tensor.elem_type, tuple(s if isinstance(s, int) else self._fresh(str(s)) for s in given)
            )
        if not tensor.HasField("shape"):
            return AbstractValue(tensor.elem_type, None)
        sizes = (
            int(d.dim_value) if d.HasField("dim_value") else self._fresh(d.dim_param or f"{info.name}[{axis}]")
            for axis, d in enumerate(tensor.shape.dim)
        )
        return self._with_symbols(info.name, AbstractValue(tensor.elem_type, tuple(sizes)))

    def _constant(self, name: str) -> Values | None:
        tensor = self.graph.initializers.get(name)
        if tensor is not None and (np.prod(tensor.dims) > MAX_VALUES or tensor.data_type not in VALUE_TYPES):
            return None
        array = self.graph.constant(name)
        return None if array is None else _objects(array)

    def _outputs(self, node: Node) -> Sequence[AbstractValue]:
        inputs = [self.operands.get(name) for name in node.inputs]
        if node.op == "Constant":
            array = self.graph.constant(node.outputs[0])
            if array is not None:
                element = int(onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
                return [AbstractValue(element, array.shape, _objects(array))]
        declared = self._node_inference(node, inputs)
        with contextlib.suppress(UnknownError, *MALFORMED):
            value = self._value(node, inputs)
            if value is not None:
                return [AbstractValue(declared[0].element, value.shape, value), *declared[1:]]
        with contextlib.suppress(UnknownError, *MALFORMED):
            for i, shape in enumerate(self._shapes(node, inputs)):
                if all(
                    size is None or isinstance(size, Dim) or (type(size) is int and size >= 0) for size in shape or ()
                ):
                    declared[i] = AbstractValue(declared[i].element, shape or declared[i].shape)
        return [self._complete(name, d) for name, d in zip(node.outputs, declared, strict=True)]

    def _shapes(self, node: Node, inputs: Sequence[AbstractValue | None]) -> Sequence[Sizes | None]:
        rule = SHAPE_RULES.get(node.op)
        return [] if rule is None else rule(node, inputs, self.equations)

    def _value(self, node: Node, inputs: Sequence[AbstractValue | None]) -> Values | None:
        rule = VALUE_RULES.get(node.op)
        if rule is None or any(o is None or (o.value is None and node.op != "Shape") for o in inputs):
            return None
        value = rule(node, [o for o in inputs if o is not None])
        return value if value.size <= MAX_VALUES else None

    def _complete(self, name: str, operand: AbstractValue) -> AbstractValue:
        """`operand` with a symbol for each size that is still unknown."""
        if operand.shape is None:
            return operand
        sizes = tuple(self._fresh(f"{name}[{axis}]") if s is None else s for axis, s in enumerate(operand.shape))
        return self._with_symbols(name, AbstractValue(operand.element, sizes))

    def _with_symbols(self, name: str, operand: AbstractValue) -> AbstractValue:
        """`operand` with symbols for the elements of a small integer tensor whose values are unknown."""
        shape = operand.shape
        if operand.element != onnx.TensorProto.INT64 or shape is None or len(shape) > 1:
            return operand
        count = shape[0] if shape else 1
        if not isinstance(count, int) or not 0 <= count <= MAX_SYMBOLIC_VALUES:
            return operand
        value = np.empty(count, dtype=object)
        value[:] = [self._fresh(f"{name}{{{i}}}") for i in range(count)]
        return AbstractValue(operand.element, shape, value.reshape(tuple(s for s in shape if isinstance(s, int))))

    def _node_inference(self, node: Node, inputs: Sequence[AbstractValue | None]) -> list[AbstractValue]:
        """Types and shapes by onnx's own inference; sizes it does not know are None."""
        unknown = [AbstractValue(self._element_by_rule(node, inputs), None) for _ in node.outputs]
        domain, _, op = node.op.rpartition(".")
        given = [(name, known) for name, known in zip(node.inputs, inputs, strict=True) if name]
        opaque = any(known is None for _, known in given)
        if opaque or domain or node.captured or not onnx.defs.has(op, self.graph.opset):
            return unknown
        types = {name: self._type(known) for name, known in given if known is not None}
        data = {name: tensor for name, known in given if known and (tensor := _int64_tensor(name, known)) is not None}
        try:
            inferred = shape_inference.infer_node_outputs(
                onnx.defs.get_schema(op, self.graph.opset),
                node.proto,
                types,
                data,
                opset_imports=[onnx.helper.make_opsetid("", self.graph.opset)],
            )
        except Exception:  # an unusual node is a node about which nothing is known
            return unknown
        if not inferred and node.op in BOOL_OPERATORS:
            return [AbstractValue(onnx.TensorProto.BOOL, None)]
        return [self._operand(inferred.get(name)) for name in node.outputs]

    def _element_by_rule(self, node: Node, inputs: Sequence[AbstractValue | None]) -> int:
        """The outputs' element type where a rule of our own gives their shapes; 0 elsewhere."""
        place = ELEMENT_SOURCES.get(node.op, 0)
        source = inputs[place] if node.op in SHAPE_RULES and len(inputs) > place else None
        return 0 if source is None else source.element

    def _type(self, known: AbstractValue) -> onnx.TypeProto:
        """A type for onnx's inference, with a dim_param for each size that is no number."""
        if known.shape is None:
            return onnx.helper.make_tensor_type_proto(known.element, None)
        sizes = [size if isinstance(size, int) else self._text(size) for size in known.shape]
        return onnx.helper.make_tensor_type_proto(known.element, sizes)

    def _text(self, size: Dim) -> str:
        """A dim_param that stands for `size` and for nothing else."""
        text = self._names.setdefault(size, f"size{len(self._names)}")
        self._sizes[text] = size
        return text

    def _operand(self, proto: onnx.TypeProto | None) -> AbstractValue:
        if proto is None or not proto.HasField("tensor_type"):
            return AbstractValue(0, None)
        tensor = proto.tensor_type
        if not tensor.HasField("shape"):
            return AbstractValue(tensor.elem_type, None)
        sizes = (
            int(d.dim_value) if d.HasField("dim_value") else self._sizes.get(d.dim_param) for d in tensor.shape.dim
        )
        return AbstractValue(tensor.elem_type, tuple(sizes))  # type: ignore[arg-type]


def _int64_tensor(name: str, known: AbstractValue) -> onnx.TensorProto | None:
    """The value of an int64 tensor that is known and made of plain numbers."""
    numbers = known.numbers()
    if numbers is None or known.element != onnx.TensorProto.INT64:
        return None
    return onnx.numpy_helper.from_array(np.asarray(numbers, dtype=np.int64), name)


def _objects(array: npt.NDArray[Any]) -> Values | None:
    """The numbers of a small array."""
    if array.size > MAX_VALUES or array.dtype.kind in "OSUc":
        return None
    numbers = array if array.dtype.kind in "iub" else array.astype(float)
    out = np.empty(array.size, dtype=object)
    out[:] = numbers.ravel().tolist()
    return out.reshape(array.shape)
