"""What the families find in a model: candidates, their masks read, and misses with reasons."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from ..errors import UnsupportedModelError
from ..graph import Graph, NewNode, Node, TooComplexError
from ..patterns import FAMILIES, PAST_LENGTH, CacheTensor, DecoderGraph, Family, Match, Miss, MissError, read_decoder
from ..patterns.masks.facts import with_mask_facts
from ..patterns.masks.reader import MaskReader
from ..spec import CROSS
from .site import Candidate, extended


@dataclass(frozen=True)
class Reading:
    """A model as it was read: its shapes and caches, and what was found in it."""

    decoder: DecoderGraph
    candidates: tuple[Candidate, ...]
    misses: tuple[Miss, ...]


def search(graph: Graph, caches: Collection[CacheTensor], apart: Collection[str]) -> Reading:
    """Match every anchor of every family, where the caches `apart` have lengths of their own."""
    decoder = read_decoder(graph, caches, apart)
    found = tuple(_found(decoder))
    candidates = (each for each in found if isinstance(each, Candidate))
    reader = MaskReader(decoder)
    return Reading(
        decoder,
        tuple(each if each.kind == CROSS else with_mask_facts(decoder, reader, each) for each in candidates),
        tuple(each for each in found if isinstance(each, Miss)),
    )


def _found(decoder: DecoderGraph) -> Iterator[Candidate | Miss]:
    for node in decoder.graph.nodes:
        for family in FAMILIES:
            if node.op in family.ANCHORS:
                try:
                    match = family.match(decoder, node)
                    if match is not None:
                        yield _candidate(match, family, node)
                except (MissError, TooComplexError, UnsupportedModelError) as error:
                    yield Miss(node.name, str(error))


def _candidate(match: Match, family: Family, node: Node) -> Candidate:
    """The match with the kind of its caches. Raises MissError if it is not sound for that kind."""
    kinds = {cache.kind for cache in match.caches}
    if len(kinds) > 1:
        names = ", ".join(match.cache_inputs)
        raise MissError(f"keys and values come from one cache that grows and one that does not: {names}")
    (kind,) = kinds
    counts_past = any(isinstance(part, NewNode) and PAST_LENGTH in part.inputs for part in match.prologue)
    if kind == CROSS and (match.is_causal or match.window or counts_past):
        raise MissError(f"its mask counts tokens of {match.cache_inputs[0]!r}, which are not the decoder's")
    return extended(Candidate, match, family=family.FAMILY, node=node.name, kind=kind)
