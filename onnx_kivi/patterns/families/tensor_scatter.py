"""ai.onnx TensorScatter into buffers of fixed size, read by Attention that is told how much they hold (opset 24).

The buffers go: our cache holds the tokens that were written. That is the same only while they are written one after
the other from the start, for all rows alike; a run with other write indices or lengths stops.
Source: ONNX operator specification, TensorScatter-24 and Attention-24 (causal masks count from the held length).
"""

from __future__ import annotations

from dataclasses import replace

from ...graph import Node
from ..caches import CacheTensor, Port, Ports
from ..decoder_graph import PAST_LENGTH, DecoderGraph
from ..match import Added, MaskTerm, Match, MissError
from ..prologue import Prologue
from .onnx_attention import NONPAD, attention

FAMILY = "tensor_scatter"
ANCHORS = ("Attention",)
PORTS: Ports = {"TensorScatter": (Port(0, 0, 2, new=1, fixed=True),)}

WRITE_INDICES = 2
WRITTEN = "tokens_must_be_written_where_the_cache_ends"
HELD = "rows_must_be_of_one_length"
ONE_LENGTH = "its buffers hold equally many tokens of all rows"


def match(decoder: DecoderGraph, node: Node) -> Match | None:
    """The match of an Attention node that is told how much its buffers hold; None for others."""
    found = attention(decoder, node, fixed=True) if node.input(NONPAD) else None
    if found is None:
        return None
    if node.attr("left_window_size", -1) >= 0 or node.attr("right_window_size", -1) >= 0:
        raise MissError("a window over a buffer; expected none")
    prologue = Prologue(decoder.graph)
    total = total_tokens(decoder, prologue, found)
    guard = prologue.require(prologue.node("Equal", node.inputs[NONPAD], total), HELD)
    for at_end in dict.fromkeys(written_at_end(decoder, prologue, cache) for cache in found.caches):
        guard = prologue.node("Add", guard, prologue.require(at_end, WRITTEN))
    mask = tuple(held_part(prologue, term, total) for term in found.mask)
    return replace(
        found,
        mask=(*mask, Added(prologue.unsqueeze(guard, 1, 2, 3))),
        is_causal=bool(node.attr("is_causal", 0)),
        prologue=prologue.parts,
        one_length=ONE_LENGTH,
    )


def total_tokens(decoder: DecoderGraph, prologue: Prologue, match: Match) -> str:
    """Tokens that the buffers hold, the new ones included, shape (1)."""
    keys = match.caches[0]
    return prologue.node("Add", PAST_LENGTH, new_size(decoder, prologue, keys, keys.new_axis))


def new_size(decoder: DecoderGraph, prologue: Prologue, cache: CacheTensor, axis: int) -> str:
    """Size of an axis of the new tokens, shape (1), read where all layers can read it if possible."""
    return prologue.size(*(decoder.on_input(cache.new, axis) or (cache.new, axis)))


def written_at_end(decoder: DecoderGraph, prologue: Prologue, cache: CacheTensor) -> str:
    """Whether each row's tokens are written right behind the past ones, (B). Raises MissError for other operators."""
    node = decoder.graph.producer(cache.joined)
    if node is None or node.op not in PORTS:
        raise MissError(f"{node}: expected a buffer that TensorScatter writes to")
    if node.attr("axis", -2) not in (-2, 2) or node.attr("mode", "linear") != "linear":
        raise MissError(f"{node}: expected a linear buffer with its tokens on axis 2")
    if not node.input(WRITE_INDICES):
        raise MissError(f"{node}: no write indices: every step would begin at 0")
    return prologue.node("Equal", node.inputs[WRITE_INDICES], PAST_LENGTH)


def held_part(prologue: Prologue, term: MaskTerm, total: str) -> MaskTerm:
    """A mask over the buffer as one over the tokens held. Raises MissError for one that has no axis of tokens."""
    if not term.layout.endswith("T"):
        raise MissError(f"mask {term.tensor!r} of layout {term.layout!r}; expected the tokens on its last axis")
    cut = prologue.node("Slice", term.tensor, prologue.ints(0), total, prologue.ints(-1))
    return replace(term, tensor=cut)
