"""ai.onnx Attention (opset 23 and up) over a cache: joined by Concat outside, or with past and present inside."""

from __future__ import annotations

from dataclasses import replace

from ...graph import Node
from ..caches import Port, Ports
from ..decoder_graph import DecoderGraph
from ..match import Match, MissError
from ..matching import attention_node

FAMILY = "onnx_attention"
ANCHORS = attention_node.ANCHORS
PORTS: Ports = {"Attention": (Port(4, 1, 2), Port(5, 2, 2))}


def match(decoder: DecoderGraph, node: Node) -> Match | None:
    """The match of an Attention node; None if it reads no cache that grows."""
    found = attention_node.attention(decoder, node, fixed=False)
    if found is None:
        return None
    if node.input(attention_node.NONPAD):
        raise MissError("nonpad_kv_seqlen over a cache joined by Concat; expected a mask")
    causal, window = attention_node.causality(node)
    return replace(found, is_causal=causal, window=window)
