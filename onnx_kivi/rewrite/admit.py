"""Which candidates are admitted: those that are caches by all signs and can be cut out of the graph together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph import Graph
from ..naming import may_be_present_of, of_one_layer
from ..patterns import FAMILIES, DecoderGraph, Miss, find_caches
from ..spec import SELF
from .plan import Plan, make_plan
from .search import Reading, search
from .site import Candidate
from .vanishing import leaks


@dataclass(frozen=True)
class Admitted:
    """Candidates that can be cut out together, the plan for what they leave, and what was missed or refused."""

    decoder: DecoderGraph
    candidates: tuple[Candidate, ...]
    plan: Plan
    misses: tuple[Miss, ...]


def admit(graph: Graph, *, cross: bool) -> Admitted:
    """Search a graph and drop candidates until nothing speaks against the rest.

    All caches are first taken to hold as many tokens; those that no candidate is left for may be of another length, as
    a prompt is, and are set apart for another search. Each turn of the loop but the last either sets more caches apart
    or, with the same ones apart, drops candidates. Both are finite, so the loop ends.
    """
    ports = {op: ports for family in FAMILIES for op, ports in family.PORTS.items()}
    caches = find_caches(graph, ports, cross=cross)
    apart: frozenset[str] = frozenset()
    reading, refused = search(graph, caches, apart), dict[Candidate, Miss]()
    while kept := _kept(reading, refused):
        judged = _judge(reading.decoder, kept)
        untaken = {cache.input for cache in caches}.difference(*(each.cache_inputs for each in kept))
        if not isinstance(judged, Plan):
            refused |= judged
        elif untaken <= apart:
            return Admitted(reading.decoder, kept, judged, _misses(reading, refused))
        else:
            apart |= untaken
            reading, refused = search(graph, caches, apart), {}
    return Admitted(reading.decoder, (), Plan({}, {}), _misses(reading, refused))


def _kept(reading: Reading, refused: dict[Candidate, Miss]) -> tuple[Candidate, ...]:
    return tuple(each for each in reading.candidates if each not in refused)


def _misses(reading: Reading, refused: dict[Candidate, Miss]) -> tuple[Miss, ...]:
    return (*reading.misses, *dict.fromkeys(refused.values()))


def _judge(decoder: DecoderGraph, kept: Sequence[Candidate]) -> Plan | dict[Candidate, Miss]:
    """What to put in the place of what vanishes, or the candidates that something speaks against."""
    refused = _unlike_a_cache(kept) or leaks(decoder, kept)
    if refused:
        return refused
    planned = make_plan(decoder, kept)
    return planned if isinstance(planned, Plan) else dict.fromkeys(kept, planned)


def _unlike_a_cache(candidates: Sequence[Candidate]) -> dict[Candidate, Miss]:
    """Candidates whose keys and values are named as of different layers, or are not returned."""
    reasons = {each: _unlikeness(each) for each in candidates}
    return {each: Miss(each.node, reason) for each, reason in reasons.items() if reason}


def _unlikeness(candidate: Candidate) -> str:
    pairs = list(zip(candidate.cache_inputs, candidate.cache_outputs, strict=True))
    if not of_one_layer(candidate.cache_inputs):
        return f"keys and values come from caches of different layers: {', '.join(candidate.cache_inputs)}"
    for past, present in pairs:
        if candidate.kind == SELF and not present:
            return f"no output returns {past!r} joined with the new tokens; it may be no cache"
    for past, present in pairs:
        if not may_be_present_of(past, present):
            return f"{past!r} joined with the new tokens is returned as {present!r}; expected its own"
    return ""
