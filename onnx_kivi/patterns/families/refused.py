"""Attention operators over caches that can't be rewritten to the same result: a miss that says why, for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...graph import Node
from ..caches import Ports
from ..decoder_graph import DecoderGraph
from ..match import Match, MissError

FAMILY = "refused"
PORTS: Ports = {}
EXPORT_AGAIN = "export with GroupQueryAttention or MultiHeadAttention instead"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Index of the operator's cache input, and what stands in the way."""

    past: int
    reason: str


REFUSALS: Mapping[str, Refusal] = {
    "com.microsoft.QAttention": Refusal(
        8, f"the projection inside it rounds to 8 bits in a way of its own; {EXPORT_AGAIN}"
    ),
    "com.microsoft.DecoderMaskedMultiHeadAttention": Refusal(
        5, f"its keys lie in an order of the kernel's own, in a buffer shared by beams; {EXPORT_AGAIN}"
    ),
    "com.microsoft.DecoderMaskedSelfAttention": Refusal(
        4, f"its keys lie in an order of the kernel's own, in a buffer shared by beams; {EXPORT_AGAIN}"
    ),
    "com.microsoft.PagedAttention": Refusal(
        3, f"its cache is a pool of pages that other sequences use too; {EXPORT_AGAIN}"
    ),
    "com.microsoft.SparseAttention": Refusal(
        3, f"queries see blocks of keys by a table that can't be told to our op; {EXPORT_AGAIN}"
    ),
}
ANCHORS = tuple(REFUSALS)


def match(_: DecoderGraph, node: Node) -> Match | None:
    """None for a node without a cache. Raises MissError for one that has it."""
    refusal = REFUSALS[node.op]
    if node.input(refusal.past):
        raise MissError(f"{node.op}: {refusal.reason}")
    return None
