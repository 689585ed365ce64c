"""Whether a set of sites can be cut out of a graph, and what must be put in the place of the shapes they leave.

Two proofs, for all families alike. Nothing that vanishes is read by anything that stays, except by Shape. And every
such Shape that is still needed can be computed from the past length and from tensors that stay and exist before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..graph import Dim, Node, Shape, Source
from ..patterns import Added, DecoderGraph, Miss, NewNode, Site
from ..patterns.caches import PAST_LENGTH
from ..spec import CROSS


@dataclass(frozen=True, slots=True)
class Plan:
    """What to put in the place of what vanishes.

    shapes: per Shape node that loses its input, the sizes it gave. sources: where each of their symbols is read. idle:
    results of attention that no output of the model needs, caches aside.
    """

    shapes: Mapping[int, Shape]
    sources: Mapping[str, Source]
    idle: frozenset[str] = frozenset()


def misses(decoder: DecoderGraph, sites: Sequence[Site]) -> dict[int, Miss]:
    """The sites that can't be cut out together with the others, by position, each with its reason."""
    covered = frozenset[int]().union(*(site.covered for site in sites))
    gone = [_vanishing(decoder, site) for site in sites]
    all_gone = frozenset[str]().union(*gone)
    reasons = {i: next(_leaks(decoder, site, covered, gone[i], all_gone), None) for i, site in enumerate(sites)}
    return {i: Miss(sites[i].node, reason) for i, reason in reasons.items() if reason is not None}


def make_plan(decoder: DecoderGraph, sites: Sequence[Site]) -> Plan | Miss:
    """The shapes to rebuild for these sites, or the one that can't be."""
    gone = {name for site in sites for name in _vanishing(decoder, site)}
    makers = {site.output.tensor: site for site in sites}
    dropped = {name for site in sites for name in site.cache_outputs}
    shapes: dict[int, Shape] = {}
    sources: dict[str, Source] = {}
    pending = [name for name in decoder.graph.outputs if name not in dropped]
    seen = set(pending)
    while pending:
        tensor = pending.pop()
        needs: Collection[str]
        node = decoder.graph.producer(tensor)
        if tensor in makers:
            needs = _operands(makers[tensor])
        elif node is None:
            continue
        elif node.op == "Shape" and node.inputs[0] in gone:
            rebuilt = _rebuilt(decoder, node, gone)
            if isinstance(rebuilt, Miss):
                return rebuilt
            shapes[node.index], places = rebuilt
            sources |= places
            needs = [place.tensor for place in places.values()]
        else:
            needs = (*node.inputs, *node.captured)
        pending += [name for name in needs if name not in seen]
        seen.update(needs)
    return Plan(shapes, sources, frozenset(makers.keys() - seen))


def _vanishing(decoder: DecoderGraph, site: Site) -> set[str]:
    """Tensors that go with a site: its caches, what covered nodes make, and what is made of these for Shape only.

    The inputs of a `cross` site stay, but with no tokens in most steps, so that nothing else may rely on them either.
    """
    gone = {name for i in site.covered for name in decoder.graph.nodes[i].outputs if name} | set(site.cache_inputs)
    gone.discard(site.output.tensor)
    pending = list(gone)
    while pending:
        for reader in decoder.graph.consumers(pending.pop()):
            if reader.index not in site.covered and reader.index in decoder.shape_only:
                pending += [name for name in reader.outputs if name not in gone]
                gone.update(reader.outputs)
    return gone


def _operands(site: Site) -> list[str]:
    return [*_needed_each_step(site), site.key.tensor, site.value.tensor]


def _needed_each_step(site: Site) -> list[str]:
    terms = [term.tensor if isinstance(term, Added) else term.condition for term in site.mask]
    extra = [name for new in site.prologue if isinstance(new, NewNode) for name in new.inputs]
    names = [site.query.tensor, site.head_sink, *terms, *extra]
    return [name for name in names if name]


def _leaks(
    decoder: DecoderGraph, site: Site, covered: Collection[int], gone: set[str], all_gone: Collection[str]
) -> Iterator[str]:
    fate = (
        "which a step leaves empty once the cache is stored"
        if site.kind == CROSS
        else "which would vanish with the cache"
    )
    for tensor in sorted(gone):
        for reader in decoder.graph.consumers(tensor):
            if reader.index not in covered and reader.op != "Shape" and not gone.issuperset(reader.outputs):
                yield f"{tensor!r}, {fate}, is also read by {reader}"
        if tensor in decoder.graph.outputs and tensor not in site.cache_outputs:
            yield f"{tensor!r}, {fate}, is an output of the model"
    for name in _needed_each_step(site) if site.kind == CROSS else _operands(site):
        if name in all_gone:
            yield f"{name!r}, {fate}, is an operand of the attention"


def _rebuilt(decoder: DecoderGraph, node: Node, gone: Collection[str]) -> tuple[Shape, dict[str, Source]] | Miss:
    full = decoder.shapes.shape(node.inputs[0])
    if full is None:
        return Miss(node.name, f"the shape of {node.inputs[0]!r}, which vanishes with the cache, is not known")
    sizes = full[slice(node.attr("start", 0), node.attr("end"))]
    places: dict[str, Source] = {}
    for name in sorted({s for size in sizes if isinstance(size, Dim) for s in size.symbols} - {PAST_LENGTH}):
        place = next((p for p in decoder.shapes.sources.get(name, ()) if p.tensor not in gone), None)
        maker = None if place is None else decoder.graph.producer(place.tensor)
        if place is None or (maker is not None and maker.index >= node.index):
            return Miss(
                node.name,
                f"size {name!r} of {node.inputs[0]!r} is known from the cache only; give the axis of another input "
                "that has this size the same name",
            )
        places[name] = place
    return sizes, places
