"""The parts of an ai.onnx Attention node (opset 23 and up): its caches, heads, scale, mask and causality.

Its boolean mask adds -inf where false, a fully masked row gives zeros, and is_causal and the windows count from the
past that the node itself joins (ONNX operator specification, Attention).
"""

from __future__ import annotations

import math

from ...graph import BOOL, Node
from ..decoder_graph import DecoderGraph
from ..layouts import HEADS_FIRST, SCORES
from ..match import Added, Filled, MaskTerm, Match, MissError, Operand
from .cache_view import CacheView, cache_view
from .operands import cache_operand, head_sizes

ANCHORS = ("Attention",)
MASK, PAST_KEY, NONPAD, SCORES_OUTPUT = 3, 4, 6, 3


def attention(decoder: DecoderGraph, node: Node, *, fixed: bool) -> Match | None:
    """The node over caches that are buffers of `fixed` size, or that grow; None over others. Its causality is yet to
    be told."""
    inside = bool(node.input(PAST_KEY))
    if inside and len(node.outputs) < 3:
        raise MissError("it joins past and new tokens, but gives no present keys and values; expected both as outputs")
    keys, values = (_view(decoder, node, name) for name in (node.outputs[1:3] if inside else map(node.input, (1, 2))))
    if keys is None or keys.cache.fixed != fixed:
        return None
    if values is None:
        raise MissError(f"expected the values of a cache, got {node.inputs[2]!r}")
    _check(node, keys, values)
    layout, q_heads = _query_layout(decoder, node)
    if inside:
        key, value = (Operand(name, layout) for name in node.inputs[1:3])
    else:
        key, value = (cache_operand(view, node) for view in (keys, values))
    caches = (keys.cache, values.cache)
    layouts = (HEADS_FIRST, HEADS_FIRST) if inside else (key.layout, value.layout)
    kv_heads, k_head_size, v_head_size = head_sizes(decoder, caches, layouts, q_heads)
    return Match(
        query=Operand(node.inputs[0], layout),
        key=key,
        value=value,
        output=Operand(node.outputs[0], layout),
        caches=caches,
        nodes=keys.indices | values.indices | {node.index},
        q_heads=q_heads,
        kv_heads=kv_heads,
        k_head_size=k_head_size,
        v_head_size=v_head_size,
        scale=_scale(node, k_head_size) * keys.scale,
        mask=_mask(decoder, node),
        softcap=node.real("softcap", 0.0),
        nan_to_zero=True,
    )


def causality(node: Node) -> tuple[bool, int]:
    """Whether the node is causal, and its window. Raises MissError if it counts from elsewhere than the past."""
    left, right = node.attr("left_window_size", -1), node.attr("right_window_size", -1)
    causal = node.flag("is_causal")
    if (causal or left >= 0 or right >= 0) and not node.input(PAST_KEY):
        raise MissError("is_causal or a window over a cache joined outside counts positions from 0, not from the past")
    if (left >= 0 or right > 0) and not causal:
        raise MissError(f"a window of {left} and {right} tokens without is_causal; expected a causal one")
    return causal, left + 1


def _check(node: Node, keys: CacheView, values: CacheView) -> None:
    """Raise MissError unless the values are of a cache like the keys', and the result is all that is read."""
    if values.cache.fixed != keys.cache.fixed:
        raise MissError(f"expected values from a buffer if the keys are, and only then, got {node.inputs[2]!r}")
    if len(node.outputs) > SCORES_OUTPUT and node.outputs[SCORES_OUTPUT]:
        raise MissError("the scores are an output of the node; expected only the attention result")
    if values.scale != 1.0:
        raise MissError(f"values multiplied by {values.scale}; expected as they are in the cache")


def _view(decoder: DecoderGraph, node: Node, tensor: str) -> CacheView | None:
    view = cache_view(decoder, tensor) if tensor else None
    if view is not None and len(view.axes) != 4:
        raise MissError(f"{node}: expected keys and values of 4 axes, got {len(view.axes)}")
    return view


def _query_layout(decoder: DecoderGraph, node: Node) -> tuple[str, int]:
    """How the query lies, and its heads."""
    shape = decoder.shapes.shape(node.inputs[0])
    if shape is not None and len(shape) == 3 and node.attr("q_num_heads"):
        return "BS(HD)", node.count("q_num_heads")
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        raise MissError("the number of query heads is not known")
    return "BHSD", shape[1]


def _scale(node: Node, head_size: int | None) -> float:
    """The attribute, or 1 / sqrt(head size)."""
    scale = node.attr("scale")
    if scale is None and head_size is None:
        raise MissError("no scale attribute, and the head size it follows from is not known")
    return float(scale) if scale is not None else 1 / math.sqrt(float(head_size or 1))


def _mask(decoder: DecoderGraph, node: Node) -> tuple[MaskTerm, ...]:
    """The node's mask, if it has one, as a term."""
    mask = node.input(MASK)
    if not mask:
        return ()
    rank = decoder.shapes.rank(mask)
    if rank is None or rank > 4:
        raise MissError(f"mask {mask!r}: its number of axes is not known to be at most 4")
    if decoder.shapes.element(mask) == BOOL:
        return (Filled(mask, keep=True, fill=-math.inf, layout=SCORES[4 - rank :]),)
    return (Added(mask, SCORES[4 - rank :]),)
