"""Which past inputs and present outputs a model with ghost I/O keeps, for hosts to carry stamps in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..graph import Builder, Graph
from ..patterns import DecoderGraph
from ..spec import CROSS, SELF
from .site import Site

MASK = "attention_mask"
TOKENS = ("input_ids", "inputs_embeds")
AXES, TOKENS_AXIS = 4, 2

Axes = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Carried:
    """Names of the past inputs and present outputs, keys then values, with their axes; and where B, S and T are read.

    Heads and channels have axes of their own: a host may carry fewer than the original had.
    """

    past: dict[str, Axes]
    present: dict[str, Axes]
    tokens: str
    mask: str = MASK

    def shapes(self, builder: Builder) -> tuple[str, str]:
        """Tensors (B, S) and (B, T)."""
        tokens, mask = (builder.node("Shape", name) for name in (self.tokens, self.mask))
        return (tokens if self.tokens == TOKENS[0] else builder.node("Gather", tokens, builder.ints(0, 1))), mask


def carried(decoder: DecoderGraph, sites: Sequence[Site], *, partial: bool) -> Carried | str:
    """What a host carries of this model under ghost I/O, or why it can't."""
    graph = decoder.graph
    tokens = next((name for name in TOKENS if name in graph.inputs), None)
    if partial or any(site.kind == CROSS for site in sites):
        return "hosts move the rows of caches that stay in the model, or of an encoder, and would not those in the op"
    if tokens is None or _rank(graph, MASK) != 2:
        return f"there are no inputs {TOKENS[0]} and {MASK} (batch, tokens), which tell how long the past is"
    first = min((site for site in sites if site.kind == SELF), key=lambda site: site.layer, default=None)
    if first is None or not _is_plain(graph, first):
        return "its first cache is no pair of keys and values (batch, heads, tokens, channels) that grows and returns"
    return Carried(
        dict.fromkeys(first.cache_inputs, _axes(graph, first.cache_inputs[0], "past_tokens")),
        dict.fromkeys(first.cache_outputs, _axes(graph, first.cache_inputs[0], "past_and_new_tokens")),
        tokens,
    )


def _is_plain(graph: Graph, site: Site) -> bool:
    return (
        not site.capacity
        and len(site.caches) == 2
        and all(
            cache.output and not cache.fixed and cache.axis == TOKENS_AXIS and _rank(graph, cache.input) == AXES
            for cache in site.caches
        )
    )


def _rank(graph: Graph, name: str) -> int | None:
    info = graph.inputs.get(name)
    return len(info.type.tensor_type.shape.dim) if info and info.type.tensor_type.HasField("shape") else None


def _axes(graph: Graph, past: str, tokens: str) -> Axes:
    """With rows named as the original names them."""
    rows = graph.inputs[past].type.tensor_type.shape.dim[0].dim_param or "batch_size"
    return rows, "ghost_heads", tokens, "ghost_channels"
