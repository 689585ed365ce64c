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
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Operand = str | int | float | Sequence[int]
Store = Callable[[Array, str], TensorProto]

PRODUCER = "onnx_kivi_models"


class Graph:
    """A graph under construction; `dtype` is the type that plain float operands take."""

    def __init__(self, opset: int, dtype: npt.DTypeLike, store: Store) -> None:
        self.opset = opset
        self.dtype = np.dtype(dtype)
        self._store = store
        self._scope: list[str] = []
        self._counts: Counter[str] = Counter()
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Everything added inside is named under `name`."""
        self._scope.append(name)
        try:
            yield
        finally:
            self._scope.pop()

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
        if name not in self._initializers:
            self._initializers[name] = self._store(array, name)
        return name

    def op(self, op_type: str, *operands: Operand, output: str | None = None, **attributes: Any) -> str:
        """Add one node; returns its output, named `output` if given."""
        label = "/".join(["", *self._scope, op_type])
        index = self._counts[label]
        self._counts[label] += 1
        name = f"{label}_{index}" if index else label
        result = output or f"{name}_output_0"
        inputs = [self._operand(operand) for operand in operands]
        self._nodes.append(helper.make_node(op_type, inputs, [result], name=name, **attributes))
        return result

    def model(self) -> onnx.ModelProto:
        """The finished model, with the lowest IR version that its opset allows."""
        graph = helper.make_graph(
            self._nodes, "main_graph", self._inputs, self._outputs, list(self._initializers.values())
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=helper.find_min_ir_version_for(opsets),
            producer_name=PRODUCER,
        )

    def _operand(self, operand: Operand) -> str:
        if isinstance(operand, str):
            return operand
        array = np.array(operand, self.dtype if isinstance(operand, float) else np.int64)
        name = f"{array.dtype.name}_{np.array2string(array, separator='_', floatmode='unique')}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(array, name)
        return name


def _value_info(name: str, element: npt.DTypeLike, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(element)), shape)
