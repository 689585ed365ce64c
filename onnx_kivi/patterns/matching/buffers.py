"""Buffers of fixed size that a cache takes the place of: what must be written where, and the part of masks that counts.

The cache holds the tokens that were written. That is the same only while they are written right behind the past ones.
Source: ONNX operator specification, TensorScatter-24.
"""

from __future__ import annotations

from dataclasses import replace

from ..caches import CacheTensor
from ..decoder_graph import PAST_LENGTH, DecoderGraph
from ..match import MaskTerm, Match, MissError
from ..prologue import Prologue

TENSOR_SCATTER, WRITE_INDICES = "TensorScatter", 2
WRITTEN = "tokens_must_be_written_where_the_cache_ends"
ONE_LENGTH = "its buffers hold equally many tokens of all rows"


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
    if node is None or node.op != TENSOR_SCATTER:
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
