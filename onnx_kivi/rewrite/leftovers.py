"""A miss for every cache that no site took, which says what stands in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..graph import Node
from ..naming import layer_of
from ..patterns import CacheTensor, DecoderGraph, Miss
from ..patterns.caches import grows, unjoined
from ..patterns.matching.latent import projection
from .site import Site

LATENT = "so that this is not a key/value cache; export a decoder that keeps keys and values of each head"
INSIDE = "this node reads it in a graph of its own"
MERGED = "the layers lie inside the branches of this node (a merged decoder), which can't be taken apart"
NO_CACHE = "no input is a cache: none is joined with new tokens"
WITHOUT_PAST = "export the decoder with past inputs, as optimum-cli export onnx does for a --task TASK-with-past"


def leftovers(
    decoder: DecoderGraph, sites: Sequence[Site], *, explained: bool, merged: str = "", elsewhere: str = ""
) -> Iterator[Miss]:
    """Misses of caches, unless a family has `explained` why, and of inputs that are only named like one.

    merged: why a decoder that looks merged could not be taken apart. elsewhere: where a decoder with a past is.
    """
    taken = {name for site in sites for name in site.cache_inputs}
    left = [cache for cache in decoder.caches.values() if cache.input not in taken]
    loose = unjoined(decoder.graph, decoder.caches.values())
    if not explained:
        latent = {cache.input: node for cache in left if (node := projection(decoder, cache)) is not None}
        for cache in left:
            yield Miss(cache.input, _unread(decoder, cache, latent))
    inside = "; ".join(filter(None, (f"{MERGED}: {merged}", elsewhere))) if merged else INSIDE
    yield from _not_joined(decoder, loose, inside)
    if not (left or sites or loose):
        yield Miss("model", f"{NO_CACHE}; {elsewhere or WITHOUT_PAST}")


def _not_joined(decoder: DecoderGraph, names: Sequence[str], inside: str) -> Iterator[Miss]:
    """A miss per node that reads inputs which grow before they are joined with new tokens."""
    readers: dict[Node, list[str]] = {}
    for name in names:
        reader = next((n for n in decoder.graph.consumers(name) if n.op != "Shape"), None)
        if reader is not None and grows(decoder.graph, name):
            readers.setdefault(reader, []).append(name)
    for reader, read in readers.items():
        shown = read[0] if len(read) == 1 else f"{read[0]} and {len(read) - 1} more"
        plain = f"{reader.op} reads it before it is joined with new tokens; expected Concat or attention"
        yield Miss(reader.name, f"cache {shown}: {inside if reader.captured else plain}")


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
