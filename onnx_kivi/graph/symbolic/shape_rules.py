"""What operators do to symbolic sizes: one small function per operator that onnx's own inference can't follow.

A rule gives the sizes of the outputs, None for one that it can't express, and notes in `equations` the sizes that the
operator forces to be equal; it raises UnknownError when it does not apply. Source: the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx

from ..view import Node
from .abstract import AbstractValue, Sizes, UnknownError, shape_of, slices
from .dims import Dim, divide
from .einsum import read_equation

Equations = list[Any]
OPEN_END = 1 << 31


def _reshape(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    sizes = shape_of(inputs[0])
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


def _expand(_: Node, inputs: Sequence[AbstractValue | None], __: Equations) -> list[Sizes]:
    sizes = shape_of(inputs[0])
    target_operand = inputs[1]
    if target_operand is None or target_operand.value is None:
        raise UnknownError
    target = list(target_operand.value.flat)
    rank = max(len(sizes), len(target))
    padded = [1] * (rank - len(sizes)) + list(sizes)
    wanted = [1] * (rank - len(target)) + target
    return [tuple(s if w in (1, s) else w if s == 1 else None for s, w in zip(padded, wanted, strict=True))]  # type: ignore[misc]


def _tile(_: Node, inputs: Sequence[AbstractValue | None], __: Equations) -> list[Sizes]:
    sizes, repeats = shape_of(inputs[0]), inputs[1]
    if repeats is None or repeats.value is None:
        raise UnknownError
    return [tuple(s * r for s, r in zip(sizes, repeats.value.flat, strict=True))]


def _broadcast(_: Node, inputs: Sequence[AbstractValue | None], __: Equations) -> list[Sizes]:
    shapes = [shape_of(operand) for operand in inputs]
    rank = max(map(len, shapes))
    columns = zip(*((*[1] * (rank - len(shape)), *shape) for shape in shapes), strict=True)
    sizes = [{size for size in column if size != 1} or {1} for column in columns]
    return [tuple(size.pop() if len(size) == 1 else None for size in sizes)]  # type: ignore[misc]


def _concat(node: Node, inputs: Sequence[AbstractValue | None], equations: Equations) -> list[Sizes]:
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


def _slice(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    sizes: list[Any] = list(shape_of(inputs[0]))
    for axis, start, stop in slices(node, inputs, len(sizes)):
        size = sizes[axis]
        if isinstance(size, int) and isinstance(start, int) and isinstance(stop, int):
            sizes[axis] = len(range(*slice(start, stop).indices(size)))
        elif start != 0 or not (stop == size or (isinstance(stop, int) and stop >= OPEN_END)):
            sizes[axis] = None
    return [tuple(sizes)]


def _range(_: Node, inputs: Sequence[AbstractValue | None], __: Equations) -> list[Sizes]:
    values = [None if o is None or o.value is None else o.value.item() for o in inputs]
    start, limit, delta = values
    if delta != 1 or not isinstance(start, (int, Dim)) or not isinstance(limit, (int, Dim)):
        raise UnknownError
    return [(limit - start,)]


def _constant_of_shape(_: Node, inputs: Sequence[AbstractValue | None], __: Equations) -> list[Sizes]:
    if inputs[0] is None or inputs[0].value is None:
        raise UnknownError
    return [tuple(inputs[0].value.flat)]


def _as_first(_: Node, inputs: Sequence[AbstractValue | None], __: Equations) -> list[Sizes]:
    return [shape_of(inputs[0])]


def _skip_norm(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes | None]:
    """Normalized input, mean, variance, and the sum of input and skip."""
    shape = shape_of(inputs[0])
    return [shape, None, None, shape][: len(node.outputs)]


def _fused_matmul(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    a, b = shape_of(inputs[0]), shape_of(inputs[1])
    if len(a) < 2 or len(b) < 2 or node.attr("transBatchA", 0) or node.attr("transBatchB", 0):
        raise UnknownError
    rank = max(len(a), len(b))
    pairs = zip(*((1,) * (rank - len(x)) + x[:-2] for x in (a, b)), strict=True)
    batch: list[Any] = [x if y in (1, x) else y if x == 1 else None for x, y in pairs]
    return [(*batch, a[-1 if node.attr("transA", 0) else -2], b[-2 if node.attr("transB", 0) else -1])]


def _einsum(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    shapes = [shape_of(operand) for operand in inputs]
    equation = read_equation(node.attr("equation", ""), [len(shape) for shape in shapes])
    if equation is None:
        raise UnknownError
    sizes: dict[str, set[Any]] = {}
    for labels, shape in zip(equation[0], shapes, strict=True):
        for label, size in zip(labels, shape, strict=True):
            sizes.setdefault(label, set()).add(size)
    wide = {label: found - {1} or {1} for label, found in sizes.items()}
    return [tuple(next(iter(wide[label])) if len(wide[label]) == 1 else None for label in equation[1])]  # type: ignore[misc]


def _fused_gemm(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    a, b = shape_of(inputs[0]), shape_of(inputs[1])
    return [(a[1 if node.attr("transA", 0) else 0], b[0 if node.attr("transB", 0) else 1])]


def _matmul_nbits(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    return [(*shape_of(inputs[0])[:-1], node.attr("N", 0))]


def _gather_block_quantized(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    data = list(shape_of(inputs[0]))
    if inputs[0] is not None and inputs[0].element == onnx.TensorProto.UINT8:
        data[-1] = data[-1] * (8 // node.attr("bits", 4))
    axis = node.attr("gather_axis", 0) % len(data)
    return [(*data[:axis], *shape_of(inputs[1]), *data[axis + 1 :])]


def _group_query_attention(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    *rows, hidden = shape_of(inputs[0])
    heads, kv_heads = node.attr("num_heads"), node.attr("kv_num_heads")
    if not node.input(1):
        if not isinstance(hidden, int):
            raise UnknownError
        hidden = hidden // (heads + 2 * kv_heads) * heads
    return [(*rows, hidden)]


def _multi_head_attention(_: Node, inputs: Sequence[AbstractValue | None], __: Equations) -> list[Sizes]:
    query, value = shape_of(inputs[0]), shape_of(inputs[2] if len(inputs) > 2 else None)
    if len(query) != 3:
        raise UnknownError
    return [(*query[:2], value[2] if len(value) == 3 else value[1] * value[3])]


def _packed_attention(node: Node, inputs: Sequence[AbstractValue | None], _: Equations) -> list[Sizes]:
    sizes = node.attr("qkv_hidden_sizes")
    hidden = sizes[2] if sizes else divide(shape_of(inputs[1])[1], 3)
    if hidden is None:
        raise UnknownError
    return [(*shape_of(inputs[0])[:-1], hidden)]


# The input that has the outputs' element type, where it is not the first.
ELEMENT_SOURCES: Mapping[str, int] = {"com.microsoft.GatherBlockQuantized": 2}
# Functions before opset 16, which onnx's inference does not look into.
BOOL_OPERATORS = frozenset({"GreaterOrEqual", "LessOrEqual"})

SHAPE_RULES: Mapping[str, Callable[[Node, Sequence[AbstractValue | None], Equations], Sequence[Sizes | None]]] = {
    "Reshape": _reshape,
    "Expand": _expand,
    "Tile": _tile,
    "GreaterOrEqual": _broadcast,
    "LessOrEqual": _broadcast,
    "Concat": _concat,
    "Slice": _slice,
    "Range": _range,
    "ConstantOfShape": _constant_of_shape,
    "Einsum": _einsum,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.FusedGemm": _fused_gemm,
    "com.microsoft.MatMulNBits": _matmul_nbits,
    "com.microsoft.GatherBlockQuantized": _gather_block_quantized,
    "SimplifiedLayerNormalization": _as_first,
    "com.microsoft.SkipLayerNormalization": _skip_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_norm,
    "com.microsoft.RotaryEmbedding": _as_first,
    "com.microsoft.BiasGelu": _as_first,
    "com.microsoft.FastGelu": _as_first,
    "com.microsoft.QuickGelu": _as_first,
    "com.microsoft.Gelu": _as_first,
    "com.microsoft.GroupQueryAttention": _group_query_attention,
    "com.microsoft.MultiHeadAttention": _multi_head_attention,
    "com.microsoft.Attention": _packed_attention,
}
