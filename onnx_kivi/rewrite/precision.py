"""How exact a model itself is: what any comparison of its rewrite with it must allow for."""

from __future__ import annotations

from collections.abc import Sequence

from ..graph import Graph
from ..patterns import DecoderGraph
from .site import Site

ROUGHEST_FIRST = ("bfloat16", "float16", "float")
ROUNDS_ACTIVATIONS = ("DynamicQuantizeLinear", "com.microsoft.DynamicQuantizeMatMul", "com.microsoft.QAttention")
INT8_ACCURACY_LEVEL = 4


def roughest_element(decoder: DecoderGraph, sites: Sequence[Site]) -> str:
    """The roughest type of the sites' caches and of what attends to them."""
    operands = [(site, operand.tensor) for site in sites for operand in (site.query, site.key, site.value)]
    types = [decoder.element(tensor, site.element) for site, tensor in operands]
    return min((*types, *(site.element for site in sites)), key=ROUGHEST_FIRST.index, default="float")


def rounds_activations(graph: Graph) -> bool:
    """Whether the model rounds activations to 8 bits as it runs."""
    return any(
        node.op in ROUNDS_ACTIVATIONS
        or (node.op == "QuantizeLinear" and graph.constant(node.inputs[0]) is None)
        or (node.op == "com.microsoft.MatMulNBits" and node.attr("accuracy_level", 0) == INT8_ACCURACY_LEVEL)
        for node in graph.nodes
    )
