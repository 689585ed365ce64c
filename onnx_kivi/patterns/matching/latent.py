"""Latent caches, recognized to be refused by name: a compressed state that weights project up in each run.

Such a cache has no heads, and what attention reads is not what it holds; it can't take the place of a key/value cache.
Source: DeepSeek-V2, arXiv 2405.04434.
"""

from __future__ import annotations

from ...graph import Node
from ..caches import CacheTensor
from ..decoder_graph import DecoderGraph
from .cache_view import MOVES

PROJECTIONS = ("MatMul", "Gemm", "com.microsoft.MatMulNBits")


def projection(decoder: DecoderGraph, cache: CacheTensor) -> Node | None:
    """The node that multiplies what the cache holds by weights, if one does."""
    pending, seen = [cache.joined], {cache.joined}
    while pending:
        tensor = pending.pop()
        for node in decoder.graph.consumers(tensor):
            if node.op in PROJECTIONS and node.inputs[0] == tensor and _is_weight(decoder, node.inputs[1]):
                return node
            if node.op in MOVES and node.inputs[0] == tensor:
                pending += [name for name in node.outputs if name not in seen]
                seen.update(node.outputs)
    return None


def _is_weight(decoder: DecoderGraph, tensor: str) -> bool:
    """Whether a tensor is computed from initializers alone."""
    pending, seen = [tensor], {tensor}
    while pending:
        name = pending.pop()
        node = decoder.graph.producer(name)
        if name in decoder.graph.inputs or (node is not None and node.captured):
            return False
        needs = [] if node is None else [n for n in node.inputs if n and n not in seen]
        pending += needs
        seen.update(needs)
    return True
