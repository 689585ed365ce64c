"""The attention families. To add one, write a module with these names and put it into FAMILIES below:

FAMILY: its name. ANCHORS: the operators ("Softmax", "com.microsoft.GroupQueryAttention") it is found by. PORTS: its
operators that join past and new themselves, each with the past inputs, present outputs and token axis; Concat is
known already. match(decoder, node) -> Site | None: called for every anchor; None if the node is no attention over a
cache, MissError if it is one but a guard fails, which the inspector turns into a Miss at the node. A family reads the
`DecoderGraph`, returns values and changes nothing; `layer` and `kind` are filled in by the inspector. Nodes that must
be emitted in front of the op go into `Site.prologue`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from ..graph import Node
from .caches import CacheTensor, DecoderGraph, Port, read_decoder
from .families import decomposed, gqa, mha, ms_attention, onnx_attention, refused, tensor_scatter
from .site import Added, Filled, MaskTerm, Miss, MissError, NewConstant, NewNode, Operand, Site


class Family(Protocol):
    """What a family module offers."""

    @property
    def FAMILY(self) -> str:  # noqa: N802
        """Its name."""

    @property
    def ANCHORS(self) -> tuple[str, ...]:  # noqa: N802
        """Operators it is found by."""

    @property
    def PORTS(self) -> Mapping[str, tuple[Port, ...]]:  # noqa: N802
        """Its operators that join past and new."""

    def match(self, decoder: DecoderGraph, node: Node) -> Site | None:
        """The site at `node`; see the module's docstring."""


FAMILIES: tuple[Family, ...] = (decomposed, onnx_attention, gqa, mha, ms_attention, tensor_scatter, refused)

__all__ = [
    "FAMILIES",
    "Added",
    "CacheTensor",
    "DecoderGraph",
    "Family",
    "Filled",
    "MaskTerm",
    "Miss",
    "MissError",
    "NewConstant",
    "NewNode",
    "Operand",
    "Port",
    "Site",
    "read_decoder",
]
