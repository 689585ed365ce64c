"""com.microsoft MultiHeadAttention: past and present inside, or keys and values that are caches joined outside.

Its causal mask counts from the past that the node itself joins and hides with the lowest float; its padding mask fills
with `mask_filter_value`. Without a cache it is no site.
Source: ContribOperators.md; the CPU kernel (mask forms).
"""

from __future__ import annotations

from dataclasses import replace

from ...graph import Node
from ..caches import Port, Ports
from ..decoder_graph import DecoderGraph
from ..layouts import HEADS_FIRST
from ..match import Added, MaskTerm, Match, MissError, Operand
from ..matching.cache_view import CacheView, cache_view, check_grows
from ..matching.contrib import contrib_scale, joined_cache, padding_mask, refuse
from ..matching.operands import cache_operand, head_sizes
from ..prologue import Prologue

FAMILY = "mha"
ANCHORS = ("com.microsoft.MultiHeadAttention",)
PORTS: Ports = {ANCHORS[0]: (Port(6, 1, 2), Port(7, 2, 2))}

QUERY, KEY, VALUE, INPUT_BIAS, PADDING, BIAS, PAST_KEY, PAST_VALUE = range(8)
REFUSED_INPUTS = {8: "the past length of a shared buffer", 9: "the beams of a shared buffer"}
LAYOUT = "BS(HD)"


def match(decoder: DecoderGraph, node: Node) -> Match | None:
    """The match of a MultiHeadAttention node; None if it reads no cache."""
    inside = bool(joined_cache(decoder, node, PAST_KEY, 1) and joined_cache(decoder, node, PAST_VALUE, 2))
    keys, values = (_view(decoder, name) for name in (node.outputs[1:3] if inside else (*node.inputs, "", "")[1:3]))
    if keys is None:
        return None
    if values is None or (keys.scale, values.scale) != (1.0, 1.0):
        raise MissError(f"{node.op}: expected keys and values of caches as they are, got {node.inputs[KEY:INPUT_BIAS]}")
    refuse(node, REFUSED_INPUTS, {3: "the scores"})
    causal = node.flag("unidirectional")
    if causal and not inside:
        raise MissError("unidirectional over a cache joined outside counts positions from 0, not from the past")
    prologue = Prologue(decoder.graph)
    operands = (
        _joined_inside(decoder, prologue, node) if inside else _joined_outside(decoder, prologue, node, keys, values)
    )
    heads, caches = node.count("num_heads"), (keys.cache, values.cache)
    layouts = (HEADS_FIRST, HEADS_FIRST) if inside else [operand.layout for operand in operands[1:]]
    kv_heads, k_head_size, v_head_size = head_sizes(decoder, caches, layouts, heads)
    mask = _mask(decoder, prologue, node)
    query, key, value = operands
    return Match(
        query=query,
        key=key,
        value=value,
        output=Operand(node.outputs[0], LAYOUT),
        caches=caches,
        nodes=keys.indices | values.indices | {node.index},
        q_heads=heads,
        kv_heads=kv_heads,
        k_head_size=k_head_size,
        v_head_size=v_head_size,
        scale=contrib_scale(node, k_head_size),
        mask=mask,
        is_causal=causal,
        prologue=prologue.parts,
    )


def _joined_inside(decoder: DecoderGraph, prologue: Prologue, node: Node) -> tuple[Operand, ...]:
    """Query, key and value of a node that joins past and new itself."""
    return tuple(Operand(name, LAYOUT) for name in _biased(decoder, prologue, node))


def _joined_outside(
    decoder: DecoderGraph, prologue: Prologue, node: Node, keys: CacheView, values: CacheView
) -> tuple[Operand, ...]:
    """Query, key and value of a node that reads caches."""
    query = Operand(_biased_query(decoder, prologue, node), LAYOUT)
    return query, cache_operand(keys, node), cache_operand(values, node)


def _mask(decoder: DecoderGraph, prologue: Prologue, node: Node) -> tuple[MaskTerm, ...]:
    padding, bias = node.input(PADDING), node.input(BIAS)
    terms: tuple[MaskTerm, ...] = (Added(bias),) if bias else ()
    return (padding_mask(decoder, prologue, node, padding, batch_of=node.inputs[QUERY]), *terms) if padding else terms


def _biased(decoder: DecoderGraph, prologue: Prologue, node: Node) -> tuple[str, ...]:
    """Query, key and value, (B, S, heads * D), with their parts of the projection's bias."""
    names = node.inputs[:3]
    if not all(names) or decoder.shapes.rank(names[0]) != 3:
        raise MissError(f"{node.op}: packed operands; expected query, key and value of 3 axes")
    if not node.input(INPUT_BIAS):
        return names
    sizes = [width for name in names if (width := decoder.last_size(name)) is not None]
    if len(sizes) != len(names):
        raise MissError(f"{node.op}: a bias whose parts are not known, for the widths of query, key and value are not")
    parts = prologue.split(node.inputs[INPUT_BIAS], 0, *sizes)
    return tuple(prologue.node("Add", name, part) for name, part in zip(names, parts, strict=True))


def _biased_query(decoder: DecoderGraph, prologue: Prologue, node: Node) -> str:
    """Query, (B, S, heads * D), with its part of a bias that leaves keys and values as they are in the cache."""
    query, bias = node.inputs[QUERY], node.input(INPUT_BIAS)
    if not bias:
        return query
    width, values = decoder.last_size(query), decoder.graph.constant(bias)
    if width is None or values is None or values[width:].any():
        raise MissError(
            f"{node.op}: input {INPUT_BIAS}, the bias of a projection of what is in the cache already, is given; "
            "expected none, or zeros for keys and values"
        )
    own, _ = prologue.split(bias, 0, width, len(values) - width)
    return prologue.node("Add", query, own)


def _view(decoder: DecoderGraph, tensor: str) -> CacheView | None:
    """What a tensor shows of a cache as (B, H, T, D), which may be merged to (B, T, heads * D)."""
    view = cache_view(decoder, tensor) if tensor else None
    if view is not None:
        check_grows(view)
    if view is not None and len(view.axes) == 3:
        batch, tokens, heads = view.axes
        return replace(view, axes=(batch, heads[:-1], tokens, heads[-1:]))
    return view if view is not None and len(view.axes) == 4 else None
