"""What operators do to small values and to symbolic sizes: the rules of `shapes`, one small function per operator.

A value rule computes an operator on object arrays of numbers and `Dim`s; a shape rule gives the output's sizes, with
None for a size that it can't express. Either raises UnknownError when it does not apply. Source: the ONNX operator
specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from .dims import Dim, divide
from .view import Node

Values = npt.NDArray[Any]
Sizes = tuple[int | Dim, ...]
Equations = list[Any]

OPEN_END = 1 << 31


class UnknownError(Exception):
    """The rule can't tell."""


@dataclass(frozen=True, slots=True)
class Known:
    """Element type (0 = unknown), sizes (None = rank unknown) and value, if small and known."""

    element: int
    shape: Sizes | None
    value: Values | None = None

    def numbers(self) -> list[Any] | None:
        """The value as nested lists, if it is known and made of plain numbers."""
        if self.value is None or any(isinstance(x, Dim) for x in self.value.flat):
            return None
        return self.value.tolist()  # type: ignore[no-any-return]


def _array(items: Sequence[Any], shape: tuple[int, ...] | None = None) -> Values:
    out = np.empty(len(items), dtype=object)
    out[:] = list(items)
    return out.reshape(shape) if shape is not None else out


def _map(function: Callable[..., Any], *operands: Known) -> Values:
    arrays = np.broadcast_arrays(*(_value(o) for o in operands))
    return _array([function(*xs) for xs in zip(*(a.flat for a in arrays), strict=True)], arrays[0].shape)


def _ints(operand: Known | None) -> list[int]:
    if operand is None or operand.value is None or operand.numbers() is None:
        raise UnknownError
    return [int(x) for x in operand.value.flat]


def _known_shape(operand: Known | None) -> Sizes:
    if operand is None or operand.shape is None:
        raise UnknownError
    return operand.shape


def _axes(node: Node, inputs: Sequence[Known | None]) -> list[int] | None:
    if node.input(1):
        return _ints(inputs[1])
    axes = node.attr("axes")
    return None if axes is None else list(axes)


def _shape(node: Node, inputs: Sequence[Known]) -> Values:
    shape = _known_shape(inputs[0])
    if any(s is None for s in shape):
        raise UnknownError
    return _array(shape[slice(node.attr("start", 0), node.attr("end"))])


def _size(_: Node, inputs: Sequence[Known]) -> Values:
    return _array([math.prod(_known_shape(inputs[0]))], ())


def _cast(node: Node, inputs: Sequence[Known]) -> Values:
    to = node.attr("to")
    if to == onnx.TensorProto.BOOL:
        return _map(lambda x: _equal(x, 0) is False, inputs[0])
    integer = to in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return _map(lambda x: x if isinstance(x, Dim) else int(x) if integer else float(x), inputs[0])


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


def _number(function: Callable[..., Any]) -> Callable[[Node, Sequence[Known]], Values]:
    def rule(_: Node, inputs: Sequence[Known]) -> Values:
        if any(isinstance(x, Dim) for o in inputs if o.value is not None for x in o.value.flat):
            raise UnknownError
        try:
            return _map(function, *inputs)
        except (ArithmeticError, ValueError, TypeError):
            raise UnknownError from None

    return rule


def _arithmetic(function: Callable[..., Any]) -> Callable[[Node, Sequence[Known]], Values]:
    def rule(_: Node, inputs: Sequence[Known]) -> Values:
        try:
            out = _map(function, *inputs)
        except TypeError:
            raise UnknownError from None
        if any(isinstance(x, int) and abs(x) >= 1 << 63 for x in out.flat):
            raise UnknownError
        return out

    return rule


def _gather(node: Node, inputs: Sequence[Known]) -> Values:
    indices = inputs[1].value
    if indices is None or inputs[1].numbers() is None:
        raise UnknownError
    try:
        return np.asarray(np.take(_value(inputs[0]), indices.astype(np.int64), axis=node.attr("axis", 0)), dtype=object)
    except (IndexError, ValueError):
        raise UnknownError from None


def _value(operand: Known) -> Values:
    if operand.value is None:
        raise UnknownError
    return operand.value


def _slices(node: Node, inputs: Sequence[Known | None], rank: int) -> list[tuple[int, slice]]:
    if len(inputs) > 1:
        starts, ends = _ints(inputs[1]), _ints(inputs[2])
        axes = _ints(inputs[3]) if node.input(3) else list(range(len(starts)))
        steps = _ints(inputs[4]) if node.input(4) else [1] * len(starts)
    else:
        starts, ends = list(node.attr("starts", ())), list(node.attr("ends", ()))
        axes, steps = list(node.attr("axes", range(len(starts)))), [1] * len(starts)
    if any(step != 1 for step in steps) or any(not -rank <= axis < rank for axis in axes):
        raise UnknownError
    return [(axis % rank, slice(a, b)) for axis, a, b in zip(axes, starts, ends, strict=True)]


def _slice_value(node: Node, inputs: Sequence[Known]) -> Values:
    value = _value(inputs[0])
    if value.ndim == 0:
        raise UnknownError
    index = [slice(None)] * value.ndim
    for axis, part in _slices(node, inputs, value.ndim):
        index[axis] = part
    return value[tuple(index)]


def _concat_value(node: Node, inputs: Sequence[Known]) -> Values:
    try:
        return np.concatenate([_value(o) for o in inputs], axis=node.attr("axis", 0))
    except ValueError:
        raise UnknownError from None


def _unsqueeze_value(node: Node, inputs: Sequence[Known]) -> Values:
    axes = _axes(node, inputs)
    if axes is None:
        raise UnknownError
    try:
        return np.expand_dims(_value(inputs[0]), tuple(axes))
    except ValueError:
        raise UnknownError from None


def _squeeze_value(node: Node, inputs: Sequence[Known]) -> Values:
    axes = _axes(node, inputs)
    try:
        return np.squeeze(_value(inputs[0]), None if axes is None else tuple(axes))
    except ValueError:
        raise UnknownError from None


def _reshape_value(_: Node, inputs: Sequence[Known]) -> Values:
    try:
        return _value(inputs[0]).reshape(_ints(inputs[1]))
    except ValueError:
        raise UnknownError from None


def _where(_: Node, inputs: Sequence[Known]) -> Values:
    if inputs[0].numbers() is None:
        raise UnknownError
    return _map(lambda c, x, y: x if c else y, *inputs)


def _constant_of_shape_value(node: Node, inputs: Sequence[Known]) -> Values:
    shape = _ints(inputs[0])
    if any(s < 0 for s in shape) or math.prod(shape) > 64:
        raise UnknownError
    tensor = node.attr("value")
    fill = 0.0 if tensor is None else onnx.numpy_helper.to_array(tensor).item()
    return _array([fill] * math.prod(shape), tuple(shape))


def _expand_value(_: Node, inputs: Sequence[Known]) -> Values:
    shape = _ints(inputs[1])
    if any(s < 0 for s in shape) or math.prod(shape) > 64:
        raise UnknownError
    try:
        return np.asarray(_value(inputs[0]) * np.ones(shape, dtype=int))
    except ValueError:
        raise UnknownError from None


def _range_value(_: Node, inputs: Sequence[Known]) -> Values:
    start, limit, delta = (_ints(o)[0] for o in inputs)
    if delta == 0 or not 0 <= (limit - start) / delta <= 64:
        raise UnknownError
    return _array(list(range(start, limit, delta)))


VALUE_RULES: Mapping[str, Callable[[Node, Sequence[Known]], Values]] = {
    "Shape": _shape,
    "Size": _size,
    "Cast": _cast,
    "Identity": lambda _, inputs: _value(inputs[0]),
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


def _reshape(node: Node, inputs: Sequence[Known | None], _: Equations) -> list[Sizes]:
    sizes = _known_shape(inputs[0])
    target_operand = inputs[1] if len(inputs) > 1 else None
    if target_operand is None or target_operand.value is None:
        raise UnknownError
    target: list[Any] = list(target_operand.value.flat)
    if not node.attr("allowzero", 0):
        target = [sizes[i] if t == 0 and i < len(sizes) else t for i, t in enumerate(target)]
    if -1 not in target:
        return [tuple(target)]
    hole = target.index(-1)
    rest = target[:hole] + target[hole + 1 :]
    total = None if any(s is None for s in (*sizes, *rest)) else divide(math.prod(sizes), math.prod(rest))
    return [(*target[:hole], total, *target[hole + 1 :])]


def _expand(_: Node, inputs: Sequence[Known | None], __: Equations) -> list[Sizes]:
    sizes = _known_shape(inputs[0])
    target_operand = inputs[1]
    if target_operand is None or target_operand.value is None:
        raise UnknownError
    target = list(target_operand.value.flat)
    rank = max(len(sizes), len(target))
    padded = [1] * (rank - len(sizes)) + list(sizes)
    wanted = [1] * (rank - len(target)) + target
    return [tuple(s if w in (1, s) else w if s == 1 else None for s, w in zip(padded, wanted, strict=True))]  # type: ignore[misc]


def _concat(node: Node, inputs: Sequence[Known | None], equations: Equations) -> list[Sizes]:
    shapes = [o.shape for o in inputs if o is not None and o.shape is not None]
    if not shapes:
        raise UnknownError
    rank = len(shapes[0])
    axis = node.attr("axis", 0)
    if not -rank <= axis < rank or any(len(s) != rank for s in shapes):
        raise UnknownError
    axis %= rank
    for shape in shapes[1:]:
        equations += [(a, b) for i, (a, b) in enumerate(zip(shapes[0], shape, strict=True)) if i != axis]
    total: Any = sum((s[axis] for s in shapes), 0) if len(shapes) == len(inputs) else None
    return [tuple(total if i == axis else s for i, s in enumerate(shapes[0]))]


def _slice(node: Node, inputs: Sequence[Known | None], _: Equations) -> list[Sizes]:
    sizes: list[Any] = list(_known_shape(inputs[0]))
    for axis, part in _slices(node, inputs, len(sizes)):
        size, start, stop = sizes[axis], part.start, part.stop
        if isinstance(size, int):
            sizes[axis] = len(range(*slice(start, stop).indices(size)))
        elif start == 0 and stop >= OPEN_END:
            continue
        else:
            sizes[axis] = None
    return [tuple(sizes)]


def _range(_: Node, inputs: Sequence[Known | None], __: Equations) -> list[Sizes]:
    values = [None if o is None or o.value is None else o.value.item() for o in inputs]
    start, limit, delta = values
    if delta != 1 or start is None or limit is None:
        raise UnknownError
    return [(limit - start,)]


def _constant_of_shape(_: Node, inputs: Sequence[Known | None], __: Equations) -> list[Sizes]:
    if inputs[0] is None or inputs[0].value is None:
        raise UnknownError
    return [tuple(inputs[0].value.flat)]


def _as_first(_: Node, inputs: Sequence[Known | None], __: Equations) -> list[Sizes]:
    return [_known_shape(inputs[0])]


def _fused_matmul(node: Node, inputs: Sequence[Known | None], _: Equations) -> list[Sizes]:
    a, b = _known_shape(inputs[0]), _known_shape(inputs[1])
    if len(a) < 2 or len(b) < 2 or node.attr("transBatchA", 0) or node.attr("transBatchB", 0):
        raise UnknownError
    batch = a[:-2] if len(a) >= len(b) else b[:-2]
    return [(*batch, a[-1 if node.attr("transA", 0) else -2], b[-2 if node.attr("transB", 0) else -1])]


def _matmul_nbits(node: Node, inputs: Sequence[Known | None], _: Equations) -> list[Sizes]:
    return [(*_known_shape(inputs[0])[:-1], node.attr("N", 0))]


SHAPE_RULES: Mapping[str, Callable[[Node, Sequence[Known | None], Equations], list[Sizes]]] = {
    "Reshape": _reshape,
    "Expand": _expand,
    "Concat": _concat,
    "Slice": _slice,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.MatMulNBits": _matmul_nbits,
    "SimplifiedLayerNormalization": _as_first,
    "com.microsoft.SkipLayerNormalization": _as_first,
    "com.microsoft.SkipSimplifiedLayerNormalization": _as_first,
    "com.microsoft.RotaryEmbedding": _as_first,
    "com.microsoft.BiasGelu": _as_first,
    "com.microsoft.FastGelu": _as_first,
    "com.microsoft.QuickGelu": _as_first,
    "com.microsoft.Gelu": _as_first,
    "com.microsoft.GroupQueryAttention": lambda *_: [],
}
