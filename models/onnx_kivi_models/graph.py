"""Expression-style construction of one ONNX graph: each call adds a node and returns the name of its output.

Contract: names follow the exporters' habit, `/scope/Op_n` for nodes and `/scope/Op_n_output_0` for tensors; numbers and
lists given as inputs become shared initializers; weights go through `store`, which may keep them outside the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from onnx_kivi.arrays import Array
from onnx_kivi.graph import ELEMENT_CODES, Builder, NewConstant, NewNode, Number

Input = str | Number | Sequence[int]
Store = Callable[[Array, str], TensorProto]

PRODUCER = "onnx_kivi_models"
ELEMENTS = {"float32": "float", "float16": "float16"}


class ExporterNames:
    """Names in the exporters' habit; see `onnx_kivi.graph.Names`."""

    def __init__(self) -> None:
        self.scope: list[str] = []
        self._counts: Counter[str] = Counter()

    def outputs(self, op: str, stem: str, content: object, count: int) -> tuple[str, ...]:  # noqa: ARG002
        """The name that the node is about to get, and the number of the output."""
        label = self._label(op)
        return tuple(f"{_counted(label, self._counts[label])}_output_{i}" for i in range(count))

    def node(self, op: str, outputs: tuple[str, ...]) -> str:  # noqa: ARG002
        """The next name of the operator in this scope."""
        label = self._label(op)
        self._counts[label] += 1
        return _counted(label, self._counts[label] - 1)

    def constant(self, values: Number | tuple[Number, ...], element: str) -> str:
        """Type and values."""
        array = np.array(values, helper.tensor_dtype_to_np_dtype(ELEMENT_CODES[element]))
        return f"{array.dtype.name}_{np.array2string(array, separator='_', floatmode='unique')}"

    def _label(self, op: str) -> str:
        return "/".join(["", *self.scope, op])


class ModelBuilder(Builder):
    """A graph under construction; `dtype` is the type that plain float operands take."""

    def __init__(self, opset: int, dtype: npt.DTypeLike, store: Store) -> None:
        self._exporter_names = ExporterNames()
        super().__init__(opset, self._exporter_names)
        self.dtype = np.dtype(dtype)
        self._store = store
        self._weights: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Everything added inside is named under `name`."""
        self._exporter_names.scope.append(name)
        try:
            yield
        finally:
            self._exporter_names.scope.pop()

    def input(self, name: str, element: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare a graph input."""
        self._inputs.append(_value_info(name, element, shape))
        return name

    def output(self, name: str, element: npt.DTypeLike, shape: Sequence[int | str]) -> str:
        """Declare a graph output; some node must be given `name` as its output."""
        self._outputs.append(_value_info(name, element, shape))
        return name

    def weight(self, name: str, array: Array) -> str:
        """Add a named initializer, or return the one of that name."""
        if name not in self._weights:
            self._weights[name] = self._store(array, name)
        return name

    def op(self, op_type: str, *inputs: Input, output: str = "", **attributes: Any) -> str:
        """Add one node; returns its output, named `output` if given."""
        return self.node(op_type, *map(self._tensor, inputs), output=output, **attributes)

    def model(self) -> onnx.ModelProto:
        """The finished model, with the lowest IR version that its opset allows."""
        nodes = [part.proto() for part in self.parts if isinstance(part, NewNode)]
        constants = [part.proto() for part in self.parts if isinstance(part, NewConstant)]
        initializers = [*constants, *self._weights.values()]
        graph = helper.make_graph(nodes, "main_graph", self._inputs, self._outputs, initializers)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name=PRODUCER,
        )

    def _tensor(self, given: Input) -> str:
        if isinstance(given, str):
            return given
        return self.constant(given, ELEMENTS[self.dtype.name] if isinstance(given, float) else "int64")


def _counted(label: str, index: int) -> str:
    return f"{label}_{index}" if index else label


def _value_info(name: str, element: npt.DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(element)), shape)
