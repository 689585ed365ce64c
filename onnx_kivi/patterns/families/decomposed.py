"""Attention written out as product, scale, mask, Softmax, product over a cache joined by Concat.

The spellings of torch's two exporters, optimum, and onnxruntime's optimizers: scale on scores, query or both sides;
masks by Add or Where, floored or not; NaN guards; keys transposed in any way; heads repeated by Expand or Tile,
broadcast by the product, or grouped on an axis of their own; MatMul or Einsum of 3, 4 or 5 axes; softcap; learned sink
logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...graph import Node, element_name
from ..caches import DecoderGraph, Port, is_float_cast
from ..matching.axes import (
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
from ..matching.cache_view import cache_view, data_input, factor
from ..matching.operands import cache_sizes, new_tokens
from ..matching.scores import scores_before
from ..matching.softmax import Softmax, check_axis, read_softmax
from ..matching.weights import weights_after
from ..site import MissError, Operand, Site

FAMILY = "decomposed"
ANCHORS = ("Softmax", "Div")
PORTS: Mapping[str, tuple[Port, ...]] = {}


def match(decoder: DecoderGraph, node: Node) -> Site | None:
    """The site around a softmax that ends in this node; None if it is not over a cache."""
    softmax = read_softmax(decoder, node)
    return None if softmax is None else _match(decoder, softmax)


def _match(decoder: DecoderGraph, softmax: Softmax) -> Site | None:
    scores = scores_before(decoder, softmax.input)
    keys = None if scores is None else cache_view(decoder, scores.product.right)
    if scores is None or keys is None:
        return None
    check_axis(decoder, softmax)
    weights = weights_after(decoder, softmax.output, scores.sink)
    if weights is None:
        raise MissError("the attention weights do not lead to one MatMul with the values of a cache")
    first, last = scores.product.node, weights.product.node
    values = cache_view(decoder, weights.product.right)
    if values is None:
        raise MissError(f"{last}: expected the values of a cache, got {weights.product.right!r}")
    if values.scale != 1.0:
        raise MissError(f"{last}: values multiplied by {values.scale}; expected as they are in the cache")
    of_keys, of_values = key_letters(scores.product, keys), value_letters(weights.product, values)
    query_axes, score_axes = query_and_scores(decoder, scores.product, keys, of_keys)
    inner = (*scores.nodes, *softmax.nodes, *weights.nodes[:-1])
    axes = followed(decoder, inner, first.outputs[0], score_axes)
    check_sums_to_one(softmax.nodes[-1], axes[softmax.input])
    out_axes = result(weights.product, values, of_values, axes[weights.product.left])
    key, value = new_tokens(keys, of_keys), new_tokens(values, of_values)
    query, query_scale = _query(decoder, scores.product.left)
    kv_heads, k_head_size = cache_sizes(decoder, keys, key)
    v_heads, v_head_size = cache_sizes(decoder, values, value)
    if kv_heads != v_heads:
        raise MissError(f"keys have {kv_heads} heads, values {v_heads}; expected the same")
    if scores.sink and spelled(first, axes[scores.sunk], "T") not in ("BHST", "BKGST"):
        raise MissError(f"{first}: sink logits joined to merged axes; expected (batch, heads, tokens, tokens)")
    mask = tuple(replace(met.term, layout=spelled_term(met.node, axes[met.scores], met.shape)) for met in scores.mask)
    covered = {n.index for part in (scores, softmax, weights) for n in part.nodes}
    return Site(
        layer=-1,
        family=FAMILY,
        node=softmax.name,
        query=Operand(query, spelled(first, query_axes, "D")),
        key=key,
        value=value,
        output=Operand(last.outputs[0], spelled(last, out_axes, "D")),
        cache_inputs=(keys.cache.input, values.cache.input),
        cache_outputs=(keys.cache.output, values.cache.output),
        covered=frozenset(covered | keys.covered | values.covered),
        q_heads=kv_heads * group_size(first, score_axes),
        kv_heads=kv_heads,
        k_head_size=k_head_size,
        v_head_size=v_head_size,
        element=element_name(decoder.graph.inputs[keys.cache.input]),
        scale=scores.scale * keys.scale * query_scale,
        mask=mask,
        head_sink=scores.sink,
        softcap=scores.softcap,
        nan_to_zero=weights.nan_to_zero or scores.floored,
    )


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
        elif is_float_cast(decoder.shapes, node):
            tensor = node.inputs[0]
        else:
            break
    return tensor, scale
