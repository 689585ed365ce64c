"""Whether the rows of a run may hold different numbers of tokens: what in the graph follows the past length P.

A ragged batch is a left-padded one whose padding is not stored, and P is that of its longest row. For a shorter row all
that is counted from P lies that much further on. Queries, keys and values must not (see `shifts`). A mask may, as a
whole, which a softmax does not see unless it has a column of sinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..graph import NewConstant, NewNode, Node
from ..patterns import PAST_LENGTH, Added, DecoderGraph
from .shifts import LOST, Operation, Shift, Sizes, shift_of
from .site import Site

OTHER_CACHES = "caches that were not rewritten stay beside the others, and have one length"


def one_length_reason(decoder: DecoderGraph, sites: Sequence[Site], *, partial: bool) -> str:
    """Why all rows of a run must hold equally many tokens; "" if they need not."""
    own = [OTHER_CACHES] * partial + [site.one_length for site in sites if site.one_length]
    if own or not sites:
        return own[0] if own else ""
    shifts = _Shifts(decoder, sites)
    return next((reason for site in sites if (reason := shifts.reason(site))), "")


class _Shifts:
    """The shift of every tensor that has one, and the node that gave it."""

    def __init__(self, decoder: DecoderGraph, sites: Sequence[Site]) -> None:
        parts = dict.fromkeys(part for site in sites for part in site.prologue)
        constants = [part for part in parts if isinstance(part, NewConstant)]
        self._sizes = Sizes(decoder, {part.name: _elements(part) for part in constants})
        self._known: dict[str, Shift] = {PAST_LENGTH: 1}
        self._makers: dict[str, str] = {}
        covered = frozenset[int]().union(*(site.covered for site in sites))
        for node in decoder.graph.nodes:
            if node.index not in covered:
                self._follow(_of_node(node))
        for part in parts:
            if isinstance(part, NewNode):
                self._follow(_of_new(part))

    def reason(self, site: Site) -> str:
        """Why the rows of a site must be of one length; "" if they need not."""
        for operand in (site.query.tensor, site.key.tensor, site.value.tensor, site.head_sink):
            if self._known.get(operand, 0) != 0:
                return f"{self._makers[operand]} counts from the past length, for more than a mask"
        for term in site.mask:
            shift = self._known.get(term.tensor, 0)
            if shift == LOST or (shift != 0 and (site.head_sink or not isinstance(term, Added))):
                return f"{self._makers[term.tensor]} counts from the past length, for a mask that is not understood"
        return ""

    def _follow(self, operation: Operation) -> None:
        shifts = [self._known.get(name, 0) for name in operation.inputs]
        self._sizes.note(operation, shifts)
        for name in filter(None, operation.outputs):
            value = self._sizes.value(name)
            alike = value is not None and len({*value}) == 1
            shift = value[0] if alike and value else LOST if value else shift_of(self._sizes, operation, shifts)
            if shift != 0:
                self._known[name] = shift
                source = next((name for name, given in zip(operation.inputs, shifts, strict=True) if given != 0), "")
                self._makers[name] = self._makers.get(source) or f"{operation.op} {operation.name!r}"


def _elements(constant: NewConstant) -> Sequence[Any]:
    return constant.values if isinstance(constant.values, tuple) else [constant.values]


def _of_node(node: Node) -> Operation:
    return Operation(node.op, (*node.inputs, *sorted(node.captured)), node.outputs, node.attr, node.name)


def _of_new(node: NewNode) -> Operation:
    attributes: Mapping[str, Any] = dict(node.attributes)
    domain = f"{node.domain}." if node.domain else ""
    return Operation(domain + node.op, node.inputs, node.outputs, attributes.get, node.name)
