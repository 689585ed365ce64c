"""What operators do to small integer values: object arrays of numbers and `Dim`s, one small function per operator.

A rule raises UnknownError when it can't tell. Source: the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from ..elements import FLOATS, INTEGERS
from ..view import Node
from .abstract import AbstractValue, UnknownError, Values, axes_of, ints, shape_of, slices, value_of
from .dims import Dim, divide

MAX_VALUES = 64
MAX_INTEGER = 1 << 63


def _array(items: Sequence[Any], shape: tuple[int, ...] | None = None) -> Values:
    out = np.empty(len(items), dtype=object)
    out[:] = list(items)
    return out.reshape(shape) if shape is not None else out


def _map(function: Callable[..., Any], *operands: AbstractValue) -> Values:
    arrays = np.broadcast_arrays(*(value_of(o) for o in operands))
    return _array([function(*xs) for xs in zip(*(a.flat for a in arrays), strict=True)], arrays[0].shape)


def _shape(node: Node, inputs: Sequence[AbstractValue]) -> Values:
    shape = shape_of(inputs[0])
    if any(s is None for s in shape):
        raise UnknownError
    return _array(shape[slice(node.attr("start", 0), node.attr("end"))])


def _size(_: Node, inputs: Sequence[AbstractValue]) -> Values:
    return _array([math.prod(shape_of(inputs[0]))], ())


def _cast(node: Node, inputs: Sequence[AbstractValue]) -> Values:
    to = node.attr("to")
    if to == onnx.TensorProto.BOOL:
        return _map(lambda x: _equal(x, 0) is False, inputs[0])
    integer = to in INTEGERS
    if not (integer or to in FLOATS or to == onnx.TensorProto.DOUBLE):
        raise UnknownError
    out = _map(lambda x: x if isinstance(x, Dim) else int(x) if integer else float(x), inputs[0])
    if any(isinstance(x, int) and abs(x) >= MAX_INTEGER for x in out.flat):
        raise UnknownError
    return out


def _divide(x: Any, y: Any) -> Any:
    if isinstance(x, float) or isinstance(y, float):
        if isinstance(x, Dim) or isinstance(y, Dim) or y == 0:
            raise UnknownError
        return x / y
    quotient = divide(x, y)
    if quotient is None and isinstance(x, int) and isinstance(y, int) and x >= 0 and y > 0:
        quotient = x // y
    if quotient is None:
        raise UnknownError
    return quotient


def _equal(x: Any, y: Any) -> bool:
    """Whether two elements are equal, where that holds for all values of the symbols (sizes are at least 0)."""
    if x == y:
        return True
    if isinstance(x, Dim) or isinstance(y, Dim):
        dim, other = (x, y) if isinstance(x, Dim) else (y, x)
        if isinstance(other, (int, float)) and other < 0 and _is_natural(dim):
            return False
        raise UnknownError
    return False


def _is_natural(dim: Dim) -> bool:
    return all(c > 0 for _, c in dim.terms) and not any("{" in name for name in dim.symbols)


def _number(function: Callable[..., Any]) -> Callable[[Node, Sequence[AbstractValue]], Values]:
    def rule(_: Node, inputs: Sequence[AbstractValue]) -> Values:
        if any(isinstance(x, Dim) for o in inputs if o.value is not None for x in o.value.flat):
            raise UnknownError
        try:
            return _map(function, *inputs)
        except (ArithmeticError, ValueError, TypeError):
            raise UnknownError from None

    return rule


def _arithmetic(function: Callable[..., Any]) -> Callable[[Node, Sequence[AbstractValue]], Values]:
    def rule(_: Node, inputs: Sequence[AbstractValue]) -> Values:
        try:
            out = _map(function, *inputs)
        except TypeError:
            raise UnknownError from None
        if any(isinstance(x, int) and abs(x) >= MAX_INTEGER for x in out.flat):
            raise UnknownError
        return out

    return rule


def _gather(node: Node, inputs: Sequence[AbstractValue]) -> Values:
    indices = inputs[1].value
    if indices is None or inputs[1].numbers() is None:
        raise UnknownError
    try:
        return np.asarray(
            np.take(value_of(inputs[0]), indices.astype(np.int64), axis=node.attr("axis", 0)), dtype=object
        )
    except (IndexError, ValueError):
        raise UnknownError from None


def _slice_value(node: Node, inputs: Sequence[AbstractValue]) -> Values:
    value = value_of(inputs[0])
    index = [slice(None)] * value.ndim
    for axis, start, end in slices(node, inputs, value.ndim):
        if isinstance(start, Dim) or isinstance(end, Dim):
            raise UnknownError
        index[axis] = slice(start, end)
    return value[tuple(index)]


def _concat_value(node: Node, inputs: Sequence[AbstractValue]) -> Values:
    try:
        return np.concatenate([value_of(o) for o in inputs], axis=node.attr("axis", 0))
    except ValueError:
        raise UnknownError from None


def _unsqueeze_value(node: Node, inputs: Sequence[AbstractValue]) -> Values:
    axes = axes_of(node, inputs)
    if axes is None:
        raise UnknownError
    try:
        return np.expand_dims(value_of(inputs[0]), tuple(axes))
    except ValueError:
        raise UnknownError from None


def _squeeze_value(node: Node, inputs: Sequence[AbstractValue]) -> Values:
    axes = axes_of(node, inputs)
    try:
        return np.squeeze(value_of(inputs[0]), None if axes is None else tuple(axes))
    except ValueError:
        raise UnknownError from None


def _reshape_value(_: Node, inputs: Sequence[AbstractValue]) -> Values:
    try:
        return value_of(inputs[0]).reshape(ints(inputs[1]))
    except ValueError:
        raise UnknownError from None


def _where(_: Node, inputs: Sequence[AbstractValue]) -> Values:
    if inputs[0].numbers() is None:
        raise UnknownError
    return _map(lambda c, x, y: x if c else y, *inputs)


def _constant_of_shape_value(node: Node, inputs: Sequence[AbstractValue]) -> Values:
    shape = ints(inputs[0])
    if any(s < 0 for s in shape) or math.prod(shape) > MAX_VALUES:
        raise UnknownError
    tensor = node.attr("value")
    fill = 0.0 if tensor is None else onnx.numpy_helper.to_array(tensor).item()
    return _array([fill] * math.prod(shape), tuple(shape))


def _expand_value(_: Node, inputs: Sequence[AbstractValue]) -> Values:
    shape = ints(inputs[1])
    if any(s < 0 for s in shape) or math.prod(shape) > MAX_VALUES:
        raise UnknownError
    try:
        return np.asarray(value_of(inputs[0]) * np.ones(shape, dtype=int))
    except ValueError:
        raise UnknownError from None


def _range_value(_: Node, inputs: Sequence[AbstractValue]) -> Values:
    start, limit, delta = (ints(o)[0] for o in inputs)
    if delta == 0 or not 0 <= (limit - start) / delta <= MAX_VALUES:
        raise UnknownError
    return _array(list(range(start, limit, delta)))


VALUE_RULES: Mapping[str, Callable[[Node, Sequence[AbstractValue]], Values]] = {
    "Shape": _shape,
    "Size": _size,
    "Cast": _cast,
    "Identity": lambda _, inputs: value_of(inputs[0]),
    "Add": _arithmetic(lambda x, y: x + y),
    "Sub": _arithmetic(lambda x, y: x - y),
    "Mul": _arithmetic(lambda x, y: x * y),
    "Neg": _arithmetic(lambda x: -x),
    "Div": lambda _, inputs: _map(_divide, *inputs),
    "Sqrt": _number(math.sqrt),
    "Reciprocal": _number(lambda x: 1 / x),
    "Pow": _number(lambda x, y: x**y),
    "Min": _number(min),
    "Max": _number(max),
    "Not": _number(lambda x: not x),
    "And": _number(lambda x, y: bool(x and y)),
    "Equal": lambda _, inputs: _map(_equal, *inputs),
    "Where": _where,
    "Gather": _gather,
    "Slice": _slice_value,
    "Concat": _concat_value,
    "Unsqueeze": _unsqueeze_value,
    "Squeeze": _squeeze_value,
    "Reshape": _reshape_value,
    "ConstantOfShape": _constant_of_shape_value,
    "Expand": _expand_value,
    "Range": _range_value,
}
