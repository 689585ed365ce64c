"""Attention written out as product, scale, mask, Softmax, product: its parts found, and proven to be what they seem.

The spellings of torch's two exporters, optimum, and onnxruntime's optimizers: scale on scores, query or both sides;
masks by Add or Where, floored or not; NaN guards; keys transposed in any way; heads repeated by Expand or Tile,
broadcast by the product, or grouped on an axis of their own; MatMul or Einsum of 3, 4 or 5 axes; softcap; learned sink
logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...graph import Node
from ..decoder_graph import DecoderGraph
from ..match import MaskTerm, Match, MissError, Operand
from .axes import (
    check_sums_to_one,
    followed,
    group_size,
    key_letters,
    query_and_scores,
    result,
    spelled,
    spelled_term,
    value_letters,
)
from .cache_view import Axes, CacheView, cache_view, data_input, factor
from .operands import head_sizes, new_tokens
from .scores import Scores, scores_before
from .softmax import Softmax, check_axis, read_softmax
from .weights import Mixing, weights_after

ANCHORS = ("Softmax", "Div")


@dataclass(frozen=True, slots=True)
class _Attention:
    """The parts of one attention, in the order in which they run."""

    keys: CacheView
    scores: Scores
    softmax: Softmax
    values: CacheView
    mixing: Mixing


def attention(decoder: DecoderGraph, node: Node, *, fixed: bool) -> Match | None:
    """The attention around a softmax that ends in this node, over caches that are buffers of `fixed` size, or that
    grow; None over others."""
    found = _find(decoder, node, fixed)
    return None if found is None else _prove(decoder, found)


def _find(decoder: DecoderGraph, node: Node, fixed: bool) -> _Attention | None:
    softmax = read_softmax(decoder, node)
    scores = None if softmax is None else scores_before(decoder, softmax.input)
    keys = None if scores is None else cache_view(decoder, scores.product.right)
    if softmax is None or scores is None or keys is None or keys.cache.fixed != fixed:
        return None
    check_axis(decoder, softmax)
    mixing = weights_after(decoder, softmax.output, scores.sink)
    if mixing is None:
        raise MissError("the attention weights do not lead to one MatMul with the values of a cache")
    product = mixing.product
    values = cache_view(decoder, product.right)
    if values is None:
        raise MissError(f"{product.node}: expected the values of a cache, got {product.right!r}")
    if values.cache.fixed != fixed:
        raise MissError(f"{product.node}: values and keys come from a buffer of fixed size and a cache that grows")
    if values.scale != 1.0:
        raise MissError(f"{product.node}: values multiplied by {values.scale}; expected as they are in the cache")
    return _Attention(keys, scores, softmax, values, mixing)


def _prove(decoder: DecoderGraph, found: _Attention) -> Match:
    keys, scores, values, mixing = found.keys, found.scores, found.values, found.mixing
    first, last = scores.product.node, mixing.product.node
    of_keys, of_values = key_letters(scores.product, keys), value_letters(mixing.product, values)
    query_axes, score_axes = query_and_scores(decoder, scores.product, keys, of_keys)
    axes = _axes_between(decoder, found, score_axes)
    out_axes = result(mixing.product, values, of_values, axes[mixing.product.left])
    key, value = new_tokens(keys, of_keys), new_tokens(values, of_values)
    query, query_scale = _query(decoder, scores.product.left)
    caches = (keys.cache, values.cache)
    kv_heads, k_head_size, v_head_size = head_sizes(decoder, caches, (key.layout, value.layout))
    nodes = (*scores.nodes, *found.softmax.nodes, *mixing.nodes)
    return Match(
        query=Operand(query, spelled(first, query_axes, "D")),
        key=key,
        value=value,
        output=Operand(last.outputs[0], spelled(last, out_axes, "D")),
        caches=caches,
        nodes=frozenset(node.index for node in nodes) | keys.indices | values.indices,
        q_heads=kv_heads * group_size(first, score_axes),
        kv_heads=kv_heads,
        k_head_size=k_head_size,
        v_head_size=v_head_size,
        scale=scores.scale * keys.scale * query_scale,
        mask=_mask(scores, axes),
        head_sink=scores.sink,
        softcap=scores.softcap,
        nan_to_zero=mixing.nan_to_zero or scores.floored,
    )


def _axes_between(decoder: DecoderGraph, found: _Attention, score_axes: Axes) -> dict[str, Axes]:
    """Axes of every tensor from the scores to the weights."""
    scores, softmax, mixing = found.scores, found.softmax, found.mixing
    first = scores.product.node
    inner = (*scores.nodes, *softmax.nodes, *mixing.nodes[:-1])
    axes = followed(decoder, inner, first.outputs[0], score_axes)
    check_sums_to_one(softmax.nodes[-1], axes[softmax.input])
    if scores.sink and spelled(first, axes[scores.sunk], "T") not in ("BHST", "BKGST"):
        raise MissError(f"{first}: sink logits joined to merged axes; expected (batch, heads, tokens, tokens)")
    return axes


def _mask(scores: Scores, axes: dict[str, Axes]) -> tuple[MaskTerm, ...]:
    return tuple(replace(met.term, layout=spelled_term(met.node, axes[met.scores], met.shape)) for met in scores.mask)


def _query(decoder: DecoderGraph, tensor: str) -> tuple[str, float]:
    """The query before constant factors, and their product."""
    scale = 1.0
    rank = decoder.shapes.rank(tensor)
    while True:
        node = decoder.graph.producer(tensor)
        if node is None:
            break
        if node.op in ("Mul", "Div"):
            source = data_input(decoder, node)
            if source is None or decoder.shapes.rank(source) != rank:
                break
            scale *= factor(decoder, node, source)
            tensor = source
        elif decoder.is_float_cast(node):
            tensor = node.inputs[0]
        else:
            break
    return tensor, scale
