"""Attention written out as product, scale, mask, Softmax, product over a cache joined by Concat."""

from __future__ import annotations

from ...graph import Node
from ..caches import Ports
from ..decoder_graph import DecoderGraph
from ..match import Match
from ..matching import written_out

FAMILY = "decomposed"
ANCHORS = written_out.ANCHORS
PORTS: Ports = {}


def match(decoder: DecoderGraph, node: Node) -> Match | None:
    """The attention around a softmax that ends in this node; None if it is not over a cache that grows."""
    return written_out.attention(decoder, node, fixed=False)
