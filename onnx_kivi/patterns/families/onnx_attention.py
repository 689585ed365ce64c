"""ai.onnx Attention (opset 23 and up) over a cache: joined by Concat outside, or with past and present inside.

Its boolean mask adds -inf where false, a fully masked row gives zeros, and is_causal and the windows count from the
past that the node itself joins (ONNX operator specification, Attention).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...graph import BOOL, Node, element_name
from ..caches import DecoderGraph, Port
from ..matching.cache_view import CacheView, cache_view
from ..matching.operands import cache_operand, cache_sizes
from ..site import SCORES, Added, Filled, MaskTerm, MissError, Operand, Site

FAMILY = "onnx_attention"
ANCHORS = ("Attention",)
PORTS: Mapping[str, tuple[Port, ...]] = {"Attention": (Port(4, 1, 2), Port(5, 2, 2))}

MASK, NONPAD, SCORES_OUTPUT = 3, 6, 3


def match(decoder: DecoderGraph, node: Node) -> Site | None:
    """The site of an Attention node; None if it reads no cache."""
    inside = bool(node.input(4))
    if node.inputs[1] in decoder.caches and decoder.caches[node.inputs[1]].fixed:
        return None
    keys, values = (_view(decoder, node, name) for name in (node.outputs[1:3] if inside else node.inputs[1:3]))
    if keys is None:
        return None
    if values is None:
        raise MissError(f"expected the values of a cache, got {node.inputs[2]!r}")
    if node.input(NONPAD):
        raise MissError("nonpad_kv_seqlen over a cache joined by Concat; expected a mask")
    if len(node.outputs) > SCORES_OUTPUT and node.outputs[SCORES_OUTPUT]:
        raise MissError("the scores are an output of the node; expected only the attention result")
    if values.scale != 1.0:
        raise MissError(f"values multiplied by {values.scale}; expected as they are in the cache")
    layout, q_heads = query_layout(decoder, node)
    if inside:
        key, value = (Operand(name, layout) for name in node.inputs[1:3])
    else:
        key, value = (cache_operand(view, node) for view in (keys, values))
    kv_heads, k_head_size = cache_sizes(decoder, keys, key if not inside else Operand("", "BHSD"))
    v_heads, v_head_size = cache_sizes(decoder, values, value if not inside else Operand("", "BHSD"))
    if kv_heads != v_heads or q_heads % kv_heads:
        raise MissError(f"{q_heads} query heads, {kv_heads} key heads, {v_heads} value heads; expected multiples")
    causal, window = _causality(node, inside)
    return Site(
        layer=-1,
        family=FAMILY,
        node=node.name,
        query=Operand(node.inputs[0], layout),
        key=key,
        value=value,
        output=Operand(node.outputs[0], layout),
        cache_inputs=(keys.cache.input, values.cache.input),
        cache_outputs=(keys.cache.output, values.cache.output),
        covered=frozenset(
            {node.index, *(n.index for view in (keys, values) for n in view.nodes)}
            | keys.cache.nodes
            | values.cache.nodes
        ),
        q_heads=q_heads,
        kv_heads=kv_heads,
        k_head_size=k_head_size,
        v_head_size=v_head_size,
        element=element_name(decoder.graph.inputs[keys.cache.input]),
        scale=attention_scale(node, k_head_size) * keys.scale,
        mask=attention_mask(decoder, node),
        softcap=float(node.attr("softcap", 0.0)),
        is_causal=causal,
        window=window,
        nan_to_zero=True,
    )


def _view(decoder: DecoderGraph, node: Node, tensor: str) -> CacheView | None:
    view = cache_view(decoder, tensor) if tensor else None
    if view is not None and len(view.axes) != 4:
        raise MissError(f"{node}: expected keys and values of 4 axes, got {len(view.axes)}")
    return view


def query_layout(decoder: DecoderGraph, node: Node) -> tuple[str, int]:
    """How the query lies, and its heads."""
    shape = decoder.shapes.shape(node.inputs[0])
    if shape is not None and len(shape) == 3 and node.attr("q_num_heads"):
        return "BS(HD)", int(node.attr("q_num_heads"))
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        raise MissError("the number of query heads is not known")
    return "BHSD", shape[1]


def _causality(node: Node, inside: bool) -> tuple[bool, int]:
    left, right = node.attr("left_window_size", -1), node.attr("right_window_size", -1)
    causal = bool(node.attr("is_causal", 0))
    if (causal or left >= 0 or right >= 0) and not inside:
        raise MissError("is_causal or a window over a cache joined outside counts positions from 0, not from the past")
    if (left >= 0 or right > 0) and not causal:
        raise MissError(f"a window of {left} and {right} tokens without is_causal; expected a causal one")
    return causal, left + 1


def attention_scale(node: Node, head_size: int | None) -> float:
    """The attribute, or 1 / sqrt(head size)."""
    scale = node.attr("scale")
    if scale is None and head_size is None:
        raise MissError("no scale attribute, and the head size it follows from is not known")
    return float(scale) if scale is not None else 1 / math.sqrt(float(head_size or 1))


def attention_mask(decoder: DecoderGraph, node: Node) -> tuple[MaskTerm, ...]:
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
