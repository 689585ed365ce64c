"""Buffers of fixed size that tokens are written into, read whole by attention whose mask hides what they do not hold.

As torch exports transformers' StaticCache: written by ScatterElements along the tokens' axis (scatter, and index_copy
of the TorchScript exporter), by ScatterND on the buffer with its tokens in front (the dynamo exporter) or at a grid of
indices (index_put of the TorchScript exporter); read by products around a Softmax, or by ai.onnx Attention.

The buffers go: our cache holds the tokens that were written. That is the same only while each step writes its tokens
right behind the past ones, and its mask hides all that lies beyond; a run that does otherwise stops.
Source: ONNX operator specification, ScatterElements-18 and ScatterND-18.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ...graph import Node
from ..caches import CacheTensor, Port, Ports
from ..decoder_graph import PAST_LENGTH, DecoderGraph
from ..match import Added, Filled, MaskTerm, Match, MissError
from ..matching import attention_node, written_out
from ..matching.buffers import (
    ONE_LENGTH,
    TENSOR_SCATTER,
    WRITTEN,
    held_part,
    new_size,
    total_tokens,
    written_at_end,
)
from ..matching.scores import least_fill
from ..prologue import Prologue

FAMILY = "static_buffer"
ANCHORS = (*written_out.ANCHORS, *attention_node.ANCHORS)
INDICES, NEW = 1, 2
PORTS: Ports = {op: (Port(0, 0, 2, new=NEW, fixed=True, returned=True),) for op in ("ScatterElements", "ScatterND")}

HIDDEN = "mask_must_hide_what_is_not_written"


def match(decoder: DecoderGraph, node: Node) -> Match | None:
    """The match of attention over whole buffers; None if it reads none, or is told how much they hold."""
    found = _attention(decoder, node)
    if found is None:
        return None
    if not found.mask:
        name = found.caches[0].input
        raise MissError(f"buffer of fixed size {name!r}: no nonpad_kv_seqlen and no mask tells how much it holds")
    prologue = Prologue(decoder.graph)
    total = total_tokens(decoder, prologue, found)
    mask = tuple(held_part(prologue, term, total) for term in found.mask)
    guard = prologue.require(_hidden(decoder, prologue, found, total), HIDDEN)
    for at_end in dict.fromkeys(each for cache in found.caches for each in _written(decoder, prologue, cache)):
        guard = prologue.node("Add", guard, prologue.require(at_end, WRITTEN))
    return replace(
        found, mask=(*mask, Added(prologue.unsqueeze(guard, 1, 2, 3))), prologue=prologue.parts, one_length=ONE_LENGTH
    )


def _attention(decoder: DecoderGraph, node: Node) -> Match | None:
    if node.op not in attention_node.ANCHORS:
        return written_out.attention(decoder, node, fixed=True)
    if node.input(attention_node.NONPAD):
        return None
    found = attention_node.attention(decoder, node, fixed=True)
    if found is not None:
        attention_node.causality(node)
    return found


def _hidden(decoder: DecoderGraph, prologue: Prologue, match: Match, total: str) -> str:
    """Whether one of the mask's terms hides every place of the buffer from `total` on, from all queries."""
    size = _shape(decoder, match.caches[0].input)[match.caches[0].axis]
    if not isinstance(size, int):
        raise MissError(f"buffer {match.caches[0].input!r}: its number of tokens is not declared")
    beyond = prologue.node("Not", prologue.node("Less", prologue.counted(prologue.ints(size)), total))
    least = least_fill(decoder.element(match.query.tensor, match.element))
    shown = [prologue.node("And", prologue.node("Not", _hides(prologue, term, least)), beyond) for term in match.mask]
    worst = [prologue.node("ReduceMax", prologue.cast(each, "float"), keepdims=0) for each in shown]
    return prologue.node("Equal", prologue.node("Min", *worst), prologue.floats(0.0))


def _hides(prologue: Prologue, term: MaskTerm, least: float) -> str:
    """Where a term makes a score too small to count."""
    if isinstance(term, Filled):
        return prologue.node("Not", term.tensor) if term.keep else term.tensor
    added = prologue.node("Mul", prologue.cast(term.tensor, "float"), prologue.scalar(term.factor))
    return prologue.node("Not", prologue.node("Greater", added, prologue.scalar(least)))


def _written(decoder: DecoderGraph, prologue: Prologue, cache: CacheTensor) -> Iterator[str]:
    """What must be true of the places that tokens are written to. Raises MissError for what can't be told."""
    node = decoder.graph.producer(cache.joined)
    assert node is not None
    if node.op == TENSOR_SCATTER:
        yield written_at_end(decoder, prologue, cache)
        return
    if node.attr("reduction", "none") != "none":
        raise MissError(f"{node}: reduction {node.attr('reduction')!r}; expected tokens to replace what was there")
    _check_whole(decoder, node, cache)
    rank, indices = len(cache.order), node.inputs[INDICES]
    if node.op == "ScatterElements":
        if node.attr("axis", 0) % rank != cache.new_axis:
            raise MissError(f"{node}: written along axis {node.attr('axis', 0)}; expected the tokens on axis 2")
        yield _counts(decoder, prologue, _before_expand(decoder, indices), cache, cache.new_axis, rank)
        return
    shape = decoder.shapes.shape(indices)
    if shape is None or shape[-1] != cache.new_axis + 1:
        raise MissError(f"{node}: expected an index for each axis up to that of the tokens")
    for axis in range(cache.new_axis + 1):
        along = prologue.node("Gather", indices, prologue.scalar(axis), axis=-1)
        yield _counts(decoder, prologue, along, cache, axis, cache.new_axis + 1)


def _counts(decoder: DecoderGraph, prologue: Prologue, indices: str, cache: CacheTensor, axis: int, rank: int) -> str:
    """Whether indices along an axis of the new tokens count 0, 1, ..., from the past length on if it is the tokens'."""
    expected = prologue.counted(new_size(decoder, prologue, cache, axis))
    if axis == cache.new_axis:
        expected = prologue.node("Add", PAST_LENGTH, expected)
    aligned = prologue.node("Reshape", expected, prologue.ints(-1, *[1] * (rank - 1 - axis)))
    return prologue.node("Equal", prologue.cast(indices, "int64"), aligned)


def _check_whole(decoder: DecoderGraph, node: Node, cache: CacheTensor) -> None:
    """Raise MissError unless whole heads of the buffer are written."""
    new, buffer = _shape(decoder, cache.new), _shape(decoder, cache.input)
    for size, axis in zip(new, cache.order, strict=True):
        if axis not in (0, cache.axis) and size != buffer[axis]:
            raise MissError(f"{node}: {size} of {buffer[axis]} places of axis {axis} are written; expected all")


def _shape(decoder: DecoderGraph, tensor: str) -> tuple[object, ...]:
    shape = decoder.shapes.shape(tensor)
    if shape is None or len(shape) != 4:
        raise MissError(f"{tensor!r}: expected 4 axes, got {shape and len(shape)}")
    return shape


def _before_expand(decoder: DecoderGraph, tensor: str) -> str:
    """The tensor that was repeated to this one."""
    node = decoder.graph.producer(tensor)
    return node.inputs[0] if node is not None and node.op == "Expand" else tensor
