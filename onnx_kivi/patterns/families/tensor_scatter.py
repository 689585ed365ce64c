"""ai.onnx TensorScatter into buffers of fixed size, read by Attention that is told how much they hold (opset 24).

The buffers go: our cache holds the tokens that were written. That is the same only while they are written one after
the other from the start, for all rows alike; a run with other write indices or lengths stops.
Source: ONNX operator specification, TensorScatter-24 and Attention-24 (causal masks count from the held length).
"""

from __future__ import annotations

from dataclasses import replace

from ...graph import Node
from ..caches import Port, Ports
from ..decoder_graph import DecoderGraph
from ..match import Added, Match, MissError
from ..matching import attention_node
from ..matching.buffers import ONE_LENGTH, TENSOR_SCATTER, WRITTEN, held_part, total_tokens, written_at_end
from ..prologue import Prologue

FAMILY = "tensor_scatter"
ANCHORS = attention_node.ANCHORS
PORTS: Ports = {TENSOR_SCATTER: (Port(0, 0, 2, new=1, fixed=True),)}

HELD = "rows_must_be_of_one_length"


def match(decoder: DecoderGraph, node: Node) -> Match | None:
    """The match of an Attention node that is told how much its buffers hold; None for others."""
    found = attention_node.attention(decoder, node, fixed=True) if node.input(attention_node.NONPAD) else None
    if found is None:
        return None
    if node.attr("left_window_size", -1) >= 0 or node.attr("right_window_size", -1) >= 0:
        raise MissError("a window over a buffer; expected none")
    prologue = Prologue(decoder.graph)
    total = total_tokens(decoder, prologue, found)
    guard = prologue.require(prologue.node("Equal", node.inputs[attention_node.NONPAD], total), HELD)
    for at_end in dict.fromkeys(written_at_end(decoder, prologue, cache) for cache in found.caches):
        guard = prologue.node("Add", guard, prologue.require(at_end, WRITTEN))
    mask = tuple(held_part(prologue, term, total) for term in found.mask)
    return replace(
        found,
        mask=(*mask, Added(prologue.unsqueeze(guard, 1, 2, 3))),
        is_causal=node.flag("is_causal"),
        prologue=prologue.parts,
        one_length=ONE_LENGTH,
    )
