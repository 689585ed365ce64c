"""The attention families. To add one, write a module in `families` with these names and put it into FAMILIES below:

FAMILY: its name. ANCHORS: the operators ("Softmax", "com.microsoft.GroupQueryAttention") it is found by. PORTS: its
operators that join past and new themselves, each with the past inputs, present outputs and token axis; Concat is
known already. match(decoder, node) -> Match | None: called for every anchor; None if the node is no attention over a
cache of the family's kind, MissError if it is one but a guard fails. A family reads the `DecoderGraph`, returns values
and changes nothing. Nodes that must be emitted in front of the op go into `Match.prologue`.
"""

from __future__ import annotations

from typing import Protocol

from ..graph import Node
from .caches import CacheTensor, Port, Ports, find_caches
from .decoder_graph import PAST_LENGTH, ROW_PAST_LENGTH, DecoderGraph, read_decoder
from .families import decomposed, gqa, mha, ms_attention, onnx_attention, refused, static_buffer, tensor_scatter
from .match import Added, Filled, MaskTerm, Match, Miss, MissError, Operand


class Family(Protocol):
    """What a family module offers."""

    @property
    def FAMILY(self) -> str:  # noqa: N802
        """Its name."""

    @property
    def ANCHORS(self) -> tuple[str, ...]:  # noqa: N802
        """Operators it is found by."""

    @property
    def PORTS(self) -> Ports:  # noqa: N802
        """Its operators that join past and new."""

    def match(self, decoder: DecoderGraph, node: Node) -> Match | None:
        """The match at `node`; see the module's docstring."""


FAMILIES: tuple[Family, ...] = (
    decomposed,
    onnx_attention,
    gqa,
    mha,
    ms_attention,
    tensor_scatter,
    static_buffer,
    refused,
)

__all__ = [
    "FAMILIES",
    "PAST_LENGTH",
    "ROW_PAST_LENGTH",
    "Added",
    "CacheTensor",
    "DecoderGraph",
    "Family",
    "Filled",
    "MaskTerm",
    "Match",
    "Miss",
    "MissError",
    "Operand",
    "Port",
    "find_caches",
    "read_decoder",
]
