"""Nodes that bring tensors from a layout (see `patterns.layouts`) to (B, H, S, D) or (B, H, S, T), and back.

Sizes other than those of heads are read from the tensors: a 0 in a Reshape keeps the axis at its place, so axes are
split and merged where an axis of size 1 makes room.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Builder
from ..patterns import Operand
from ..patterns.layouts import SIZE_1, letters

HEADS, SPLIT_HEADS = "BHS", "BKGS"


def heads_first(builder: Builder, tensor: str, layout: str, heads: int, kv_heads: int) -> str:
    """The tensor as (B, H, S, D), or (B, H, S, T); `heads` is H. Letters that it has not become axes of size 1."""
    axes = [*letters(layout)]
    ones = [i for i, axis in enumerate(axes) if axis == SIZE_1]
    if ones:
        tensor, axes = builder.squeeze(tensor, *ones), [axis for axis in axes if axis != SIZE_1]
    sizes = {"H": heads, "K": kv_heads, "G": heads // kv_heads}
    while (i := next((i for i, axis in enumerate(axes) if len(axis) > 1), -1)) >= 0:
        tensor = _split(builder, tensor, i, len(axes), [sizes.get(letter, -1) for letter in axes[i]])
        axes[i : i + 1] = axes[i]
    order = _order("".join(axes))
    present = [letter for letter in order if letter in axes]
    if axes != present:
        tensor = builder.node("Transpose", tensor, perm=[axes.index(letter) for letter in present])
    missing = [i for i, letter in enumerate(order) if letter not in axes]
    if missing:
        tensor = builder.unsqueeze(tensor, *missing)
    if len(order) == len(HEADS) + 1:
        return tensor
    if {"K", "G"} - {*axes}:
        tensor = builder.node("Expand", tensor, builder.ints(1, kv_heads, heads // kv_heads, 1, 1))
    return builder.squeeze(builder.node("Reshape", tensor, builder.ints(0, heads, 1, 0, 0)), 2)


def laid_out(builder: Builder, tensor: str, operand: Operand, heads: int, kv_heads: int) -> None:
    """Give `tensor`, (B, H, S, D), the layout and the name of `operand`."""
    axes, given = letters(operand.layout), tensor
    flat = [letter for axis in axes for letter in axis if letter != SIZE_1]
    order = [*_order("".join(flat))]
    if len(order) > len(HEADS) + 1:
        split = builder.ints(0, kv_heads, heads // kv_heads, 0, 0)
        tensor = builder.node("Reshape", builder.unsqueeze(tensor, 2), split)
    missing = [i for i, letter in enumerate(order) if letter not in flat]
    if missing:
        tensor = builder.squeeze(tensor, *missing)
    present = [letter for letter in order if letter in flat]
    if present != flat:
        tensor = builder.node("Transpose", tensor, perm=[present.index(letter) for letter in flat])
    for i, axis in enumerate(axes):
        if axis == SIZE_1:
            tensor = builder.unsqueeze(tensor, i)
        elif len(axis) > 1:
            tensor = _merge(builder, tensor, i, len(axis), sum(map(len, axes[i + 1 :])))
    if tensor == given:
        builder.node("Identity", tensor, output=operand.tensor)
    else:
        builder.rename_last(operand.tensor)


def _order(flat: str) -> str:
    """The letters that a tensor has in the op's order, all that it may have, ending in D or T."""
    return (SPLIT_HEADS if {"K", "G"} & {*flat} else HEADS) + ("D" if "D" in flat else "T")


def _split(builder: Builder, tensor: str, i: int, rank: int, sizes: Sequence[int]) -> str:
    """Axis i of `rank` as axes of these sizes, one of which may be -1."""
    if i < rank - 1:
        tensor = builder.unsqueeze(tensor, *range(i + 1, i + len(sizes)))
    return builder.node("Reshape", tensor, builder.ints(*[0] * i, *sizes, *[0] * (rank - 1 - i)))


def _merge(builder: Builder, tensor: str, i: int, count: int, after: int) -> str:
    """`count` axes from i on as one, before `after` more."""
    if not after:
        return builder.node("Reshape", tensor, builder.ints(*[0] * i, -1))
    merged = builder.node("Reshape", tensor, builder.ints(*[0] * i, -1, *[1] * (count - 1), *[0] * after))
    return builder.squeeze(merged, *range(i + 1, i + count))
