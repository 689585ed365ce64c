"""What onnxruntime's attention operators share: the scale, masks of zeros and ones, what can't be read.

Source: onnxruntime's ContribOperators.md, and its CPU kernels where that is silent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...graph import Node, element_name
from ..caches import CacheTensor
from ..decoder_graph import DecoderGraph
from ..match import Filled, MissError
from ..prologue import Prologue

DEFAULT_FILL = -10000.0


def refuse(node: Node, inputs: Mapping[int, str], outputs: Mapping[int, str]) -> None:
    """Raise MissError if the node has one of these inputs or outputs; the values say what that one means."""
    for index, meaning in inputs.items():
        if node.input(index):
            raise MissError(f"{node.op}: input {index}, {meaning}, is given; expected none")
    for index, meaning in outputs.items():
        if len(node.outputs) > index and node.outputs[index]:
            raise MissError(f"{node.op}: output {index}, {meaning}, is read; expected only the attention result")


def joined_cache(decoder: DecoderGraph, node: Node, past: int, present: int) -> CacheTensor | None:
    """The cache that the node joins with new tokens itself; None if it has none. Raises MissError for another type."""
    name = node.input(past)
    info = decoder.graph.inputs.get(name)
    if info is not None and not element_name(info):
        raise MissError(f"{node.op}: cache {name!r} is quantized or of another type; expected float caches")
    joined = node.outputs[present] if len(node.outputs) > present else ""
    cache = decoder.caches.get(joined) if name else None
    return cache if cache is not None and not cache.new else None


def contrib_scale(node: Node, head_size: int | None) -> float:
    """The attribute, where 0 or none stands for 1 / sqrt(head size)."""
    scale = node.real("scale", 0.0)
    if scale == 0.0 and head_size is None:
        raise MissError(f"{node.op}: no scale, and the head size it follows from is not known")
    return scale or 1 / math.sqrt(float(head_size or 1))


def padding_mask(decoder: DecoderGraph, prologue: Prologue, node: Node, mask: str, batch_of: str) -> Filled:
    """The term of a mask (B, T) or (B, S, T) of zeros and ones, of ends (B), or of ends and starts (2 B).

    batch_of: a tensor whose first axis is B. Raises MissError for other forms.
    """
    fill = node.real("mask_filter_value", DEFAULT_FILL)
    sizes, batch = decoder.shapes.shape(mask), (decoder.shapes.shape(batch_of) or (None,))[0]
    if sizes is not None and len(sizes) in (2, 3):
        seen = prologue.node("Greater", prologue.cast(mask, "int64"), prologue.ints(0))
        seen_BxST = prologue.unsqueeze(seen, 1, 2) if len(sizes) == 2 else prologue.unsqueeze(seen, 1)
        return Filled(seen_BxST, keep=True, fill=fill)
    if sizes is None or len(sizes) != 1 or batch is None or sizes[0] not in (batch, batch * 2):
        raise MissError(
            f"{node.op}: mask {mask!r} of shape {sizes and [str(size) for size in sizes]}; expected (batch, total "
            "tokens), (batch, new tokens, total tokens), (batch) or (2 * batch), declared with the batch's own name"
        )
    places = prologue.counted(prologue.total_tokens(batch_of))
    if sizes[0] == batch:
        return Filled(_before(prologue, places, prologue.cast(mask, "int64")), keep=True, fill=fill)
    bounds = prologue.node("Reshape", prologue.cast(mask, "int64"), prologue.ints(2, -1))
    ends, starts = prologue.split(bounds, 0, 1, 1)
    hidden = prologue.node("Not", _before(prologue, places, starts))
    return Filled(prologue.node("And", _before(prologue, places, ends), hidden), keep=True, fill=fill)


def _before(prologue: Prologue, places: str, bound: str) -> str:
    """Whether each place comes before a row's bound, (B, 1, 1, places)."""
    return prologue.node("Less", places, prologue.node("Reshape", bound, prologue.ints(-1, 1, 1, 1)))
