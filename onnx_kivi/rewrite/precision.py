"""How exact a model itself is: what any comparison of its rewrite with it must allow for."""

from __future__ import annotations

from collections.abc import Sequence

from ..patterns import DecoderGraph
from .site import Site

ROUGHEST_FIRST = ("bfloat16", "float16", "float")


def roughest_element(decoder: DecoderGraph, sites: Sequence[Site]) -> str:
    """The roughest type of the sites' caches and of what attends to them."""
    operands = [(site, operand.tensor) for site in sites for operand in (site.query, site.key, site.value)]
    types = [decoder.element(tensor, site.element) for site, tensor in operands]
    return min((*types, *(site.element for site in sites)), key=ROUGHEST_FIRST.index, default="float")
