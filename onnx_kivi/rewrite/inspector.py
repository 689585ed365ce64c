"""What a model is: its attention sites over caches, and everything that looks like one and is not, with reasons.

Reads a model, never changes it. A site is reported only if it can be cut out whole: see `plan`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import UnsupportedModelError
from ..graph import Graph, Model, Node, load
from ..graph.symbolic.dims import TooComplexError
from ..naming import layer_of, may_be_present_of, of_one_layer
from ..patterns import FAMILIES, CacheTensor, DecoderGraph, Miss, MissError, NewNode, Port, Site, read_decoder
from ..patterns.caches import PAST_LENGTH, grows
from ..patterns.masks.facts import with_mask_facts
from ..patterns.masks.reader import MaskReader
from ..patterns.matching.latent import projection
from ..spec import CROSS, DOMAIN, SELF
from .removal import Plan, make_plan, misses
from .report import Report

OPSETS = range(11, 27)
ROUNDS_ACTIVATIONS = ("DynamicQuantizeLinear", "com.microsoft.DynamicQuantizeMatMul", "com.microsoft.QAttention")
INT8_ACCURACY_LEVEL = 4
ROUGHEST_FIRST = ("bfloat16", "float16", "float")
LATENT = "so that this is not a key/value cache; export a decoder that keeps keys and values of each head"
MERGED = (
    "the layers lie inside the branches of this node (a merged decoder); export without merging and rewrite the "
    "decoder that takes a past"
)


@dataclass(frozen=True)
class Findings:
    """What the rewriter needs beside the report."""

    decoder: DecoderGraph
    plan: Plan
    report: Report


def inspect(model: Model | str | os.PathLike[str], *, cross: bool = False) -> Report:
    """Sites and misses of a model or model file; with `cross` also those of attention over an encoder's caches.

    Raises UnsupportedModelError if it is no model to look into.
    """
    return examine(model if isinstance(model, Model) else load(model), cross=cross).report


def examine(model: Model, *, cross: bool = False) -> Findings:
    """The report, with the decoder and the plan that it rests on."""
    _check_versions(model)
    graph = Graph(model)
    if any(node.op.startswith(f"{DOMAIN}.") for node in graph.nodes):
        raise UnsupportedModelError(f"the model has {DOMAIN} nodes: it is already rewritten; start from the original")
    other: frozenset[str] = frozenset()
    while True:
        decoder, plan, sites, missed = _search(graph, other, cross)
        left = {cache.input for cache in decoder.caches.values()} - {
            name for site in sites for name in site.cache_inputs
        }
        if not sites or left <= other:
            break
        other |= left
    missed += _unmatched(decoder, sites, bool(missed))
    sites = _numbered(sites)
    element = min((_roughest(decoder, site) for site in sites), key=ROUGHEST_FIRST.index, default="float")
    return Findings(decoder, plan, Report(tuple(sites), tuple(missed), element, _rounds_activations(graph)))


def _search(graph: Graph, other: Collection[str], cross: bool) -> tuple[DecoderGraph, Plan, list[Site], list[Miss]]:
    """Sites that can be cut out together, where the `other` caches may have a length of their own, as a prompt has."""
    ports: dict[str, tuple[Port, ...]] = {op: ports for family in FAMILIES for op, ports in family.PORTS.items()}
    decoder = read_decoder(graph, ports, other, cross=cross)
    found = list(_matches(decoder))
    reader = MaskReader(decoder)
    sites = [
        site if site.kind == CROSS else with_mask_facts(decoder, reader, site)
        for site in found
        if isinstance(site, Site)
    ]
    missed = [miss for miss in found if isinstance(miss, Miss)]
    while sites:
        refused = _unlike_a_cache(sites) or misses(decoder, sites)
        if not refused:
            planned = make_plan(decoder, sites)
            if isinstance(planned, Plan):
                return decoder, planned, sites, missed
            refused = dict.fromkeys(range(len(sites)), planned)
        missed += dict.fromkeys(refused.values())
        sites = [site for i, site in enumerate(sites) if i not in refused]
    return decoder, Plan({}, {}), sites, missed


def _roughest(decoder: DecoderGraph, site: Site) -> str:
    types = (decoder.element(operand.tensor, site.element) for operand in (site.query, site.key, site.value))
    return min(site.element, *types, key=ROUGHEST_FIRST.index)


def _rounds_activations(graph: Graph) -> bool:
    return any(
        node.op in ROUNDS_ACTIVATIONS
        or (node.op == "QuantizeLinear" and graph.constant(node.inputs[0]) is None)
        or (node.op == "com.microsoft.MatMulNBits" and node.attr("accuracy_level", 0) == INT8_ACCURACY_LEVEL)
        for node in graph.nodes
    )


def _check_versions(model: Model) -> None:
    versions = {o.domain or "ai.onnx": o.version for o in model.opset_import}
    opset = versions.get("ai.onnx")
    if opset not in OPSETS:
        raise UnsupportedModelError(
            f"opset: expected ai.onnx {OPSETS.start} to {OPSETS.stop - 1} (softmax and shapes mean other things "
            f"outside), got {opset}; export again or convert with onnx.version_converter"
        )


def _matches(decoder: DecoderGraph) -> Iterator[Site | Miss]:
    for node in decoder.graph.nodes:
        for family in FAMILIES:
            if node.op in family.ANCHORS:
                found: Site | Miss | None
                try:
                    found = family.match(decoder, node)
                except (MissError, TooComplexError) as error:
                    found = Miss(node.name, str(error))
                if found is not None:
                    yield found if isinstance(found, Miss) else _of_its_kind(decoder, found)


def _of_its_kind(decoder: DecoderGraph, site: Site) -> Site | Miss:
    """The site with the kind of its caches, if it is sound for that kind."""
    kinds = {cache.kind for cache in decoder.caches.values() if cache.input in site.cache_inputs}
    if len(kinds) > 1:
        names = ", ".join(site.cache_inputs)
        return Miss(site.node, f"keys and values come from one cache that grows and one that does not: {names}")
    (kind,) = kinds
    counts_past = any(isinstance(new, NewNode) and PAST_LENGTH in new.inputs for new in site.prologue)
    if kind == CROSS and (site.is_causal or site.window or counts_past):
        return Miss(site.node, f"its mask counts tokens of {site.cache_inputs[0]!r}, which are not the decoder's")
    return replace(site, kind=kind)


def _unlike_a_cache(sites: Sequence[Site]) -> dict[int, Miss]:
    """Sites whose keys and values are named as of different layers, or are not returned, by position."""
    found = {}
    for i, site in enumerate(sites):
        if not of_one_layer(site.cache_inputs):
            names = ", ".join(site.cache_inputs)
            found[i] = Miss(site.node, f"keys and values come from caches of different layers: {names}")
        elif site.kind == SELF and "" in site.cache_outputs:
            name = site.cache_inputs[site.cache_outputs.index("")]
            found[i] = Miss(site.node, f"no output returns {name!r} joined with the new tokens; it may be no cache")
        elif crossed := [
            pair for pair in zip(site.cache_inputs, site.cache_outputs, strict=True) if not may_be_present_of(*pair)
        ]:
            past, present = crossed[0]
            found[i] = Miss(
                site.node, f"{past!r} joined with the new tokens is returned as {present!r}; expected its own"
            )
    return found


def _numbered(sites: Sequence[Site]) -> list[Site]:
    layers = [layer_of(site.cache_inputs[0]) for site in sites]
    named = [layer for layer in layers if layer is not None]
    once = len({(site.kind, layer) for site, layer in zip(sites, layers, strict=True)}) == len(sites)
    numbers = named if once and len(named) == len(sites) else range(len(sites))
    return [replace(site, layer=layer) for site, layer in zip(sites, numbers, strict=True)]


def _unmatched(decoder: DecoderGraph, sites: Sequence[Site], explained: bool) -> Iterator[Miss]:
    """A miss for each cache that no site took, unless a family has said why."""
    taken = {name for site in sites for name in site.cache_inputs}
    left = [cache for cache in decoder.caches.values() if cache.input not in taken]
    if not explained:
        latent = {cache.input: node for cache in left if (node := projection(decoder, cache)) is not None}
        for cache in left:
            yield Miss(cache.input, _unread(decoder, cache, latent))
    readers: dict[Node, list[str]] = {}
    for name in decoder.unjoined:
        reader = next((n for n in decoder.graph.consumers(name) if n.op != "Shape"), None)
        if reader is not None and grows(decoder.graph, name):
            readers.setdefault(reader, []).append(name)
    for reader, names in readers.items():
        shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        if reader.captured:
            reason = MERGED
        else:
            reason = f"{reader.op} reads it before it is joined with new tokens; expected Concat or attention"
        yield Miss(reader.name, f"cache {shown}: {reason}")
    if not (left or sites or decoder.unjoined):
        yield Miss("model", "no input is a cache: none is joined with new tokens; export the decoder with past inputs")


def _unread(decoder: DecoderGraph, cache: CacheTensor, latent: Mapping[str, Node]) -> str:
    names = (cache.input, *(name for name in latent if layer_of(name) == layer_of(cache.input) is not None))
    beside = next((name for name in names if name in latent), None)
    if beside is not None:
        name = "it" if cache.input == beside else repr(beside)
        return f"latent cache: {latent[beside]} projects {name} up in each run, {LATENT}"
    readers = [n for n in decoder.graph.consumers(cache.joined) if n.op != "Shape" and n.index not in cache.nodes]
    if not readers:
        return "a cache that nothing reads"
    size = decoder.graph.inputs[cache.input].type.tensor_type.shape.dim[cache.axis].dim_value
    if size and not cache.output:
        return f"a state of {size} tokens that {readers[0]} reads, which does not grow; --partial leaves it as it is"
    return f"a cache that {readers[0]} reads, after which no attention family recognizes it"
