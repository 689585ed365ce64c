"""com.microsoft Attention: the projection inside, keys and values of past and present packed as (2, B, H, P, D).

The projection is moved in front as MatMul and Add. Its causal mask counts from the past and hides with the lowest
float; its padding mask, in four forms, fills with `mask_filter_value`.
Source: ContribOperators.md; the CPU kernel (what it refuses: rotary, masks of 4 axes, bias beside a past).
"""

from __future__ import annotations

from ...graph import Node
from ..caches import Port, Ports
from ..decoder_graph import DecoderGraph
from ..match import Match, MissError, Operand
from ..matching.contrib import contrib_scale, joined_cache, padding_mask, refuse
from ..prologue import Prologue

FAMILY = "ms_attention"
ANCHORS = ("com.microsoft.Attention",)
PORTS: Ports = {ANCHORS[0]: (Port(4, 1, 3),)}

INPUT, WEIGHTS, INPUT_BIAS, MASK, PAST = range(5)
REFUSED_INPUTS = {5: "a bias of the scores beside a past", 6: "the past length of a shared buffer"}


def match(decoder: DecoderGraph, node: Node) -> Match | None:
    """The match of an Attention node; None if it has no past."""
    cache = joined_cache(decoder, node, PAST, 1)
    if cache is None:
        return None
    refuse(node, REFUSED_INPUTS, {})
    for name in ("do_rotary", "past_present_share_buffer"):
        if node.attr(name, 0):
            raise MissError(f"{node.op}: {name}; expected none")
    heads = node.count("num_heads")
    head_size = _head_size(decoder, node, cache.input, heads)
    prologue = Prologue(decoder.graph)
    query, key, value = (Operand(name) for name in _projected(prologue, node, heads))
    mask = node.input(MASK)
    terms = (padding_mask(decoder, prologue, node, mask, batch_of=node.inputs[INPUT]),) if mask else ()
    return Match(
        query=query,
        key=key,
        value=value,
        output=Operand(node.outputs[0], "BS(HD)"),
        caches=(cache,),
        nodes=frozenset({node.index}),
        q_heads=heads,
        kv_heads=heads,
        k_head_size=head_size,
        v_head_size=head_size,
        scale=contrib_scale(node, head_size),
        mask=terms,
        is_causal=node.flag("unidirectional"),
        prologue=prologue.parts,
    )


def _projected(prologue: Prologue, node: Node, heads: int) -> tuple[str, ...]:
    """Query, key and value, (B, heads, S, D)."""
    projected = prologue.node("MatMul", node.inputs[INPUT], node.inputs[WEIGHTS])
    if node.input(INPUT_BIAS):
        projected = prologue.node("Add", projected, node.inputs[INPUT_BIAS])
    return prologue.split(prologue.heads_first(projected, 3 * heads), 1, heads, heads, heads)


def _head_size(decoder: DecoderGraph, node: Node, past: str, heads: int) -> int | None:
    """Of queries, keys and values alike, as the packed cache needs."""
    if len(set(node.attr("qkv_hidden_sizes", ()))) > 1:
        raise MissError(f"{node.op}: qkv_hidden_sizes differ; expected the same, as one cache holds keys and values")
    size, width = decoder.last_size(past), decoder.last_size(node.inputs[WEIGHTS])
    if size is None and width is not None:
        return width // (3 * heads)
    return size
