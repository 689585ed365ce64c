"""What vanishes from a graph with its caches, and whether anything that stays would miss it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from ..graph import NewNode
from ..patterns import DecoderGraph, Miss
from ..spec import CROSS
from .site import Candidate


def vanishing(decoder: DecoderGraph, candidate: Candidate) -> set[str]:
    """Tensors that go: the caches, what covered nodes make, and what is made of these for Shape only.

    The inputs of a `cross` slot stay, but with no tokens in most steps, so that nothing else may rely on them either.
    """
    covered = candidate.covered
    gone = {name for i in covered for name in decoder.graph.nodes[i].outputs if name} | set(candidate.cache_inputs)
    gone.discard(candidate.output.tensor)
    pending = list(gone)
    while pending:
        for reader in decoder.graph.consumers(pending.pop()):
            if reader.index not in covered and reader.index in decoder.shape_only:
                pending += [name for name in reader.outputs if name not in gone]
                gone.update(reader.outputs)
    return gone


def operands(candidate: Candidate) -> list[str]:
    """Tensors that the op is made from."""
    return [*_needed_each_step(candidate), candidate.key.tensor, candidate.value.tensor]


def leaks(decoder: DecoderGraph, candidates: Sequence[Candidate]) -> dict[Candidate, Miss]:
    """Those that can't be cut out together with the others: what stays reads what vanishes, other than by Shape."""
    gone = {each: vanishing(decoder, each) for each in candidates}
    covered = frozenset[int]().union(*(each.covered for each in candidates))
    all_gone = set[str]().union(*gone.values())
    found = {}
    for each in candidates:
        reason = next(chain(_outside(decoder, each, covered, gone[each]), _own(each, all_gone)), None)
        if reason is not None:
            found[each] = Miss(each.node, reason)
    return found


def _outside(decoder: DecoderGraph, candidate: Candidate, covered: frozenset[int], gone: set[str]) -> Iterator[str]:
    """Nodes and outputs of the model that need what vanishes with a candidate."""
    fate = _fate(candidate)
    for tensor in sorted(gone):
        for reader in decoder.graph.consumers(tensor):
            if reader.index not in covered and reader.op != "Shape" and not gone.issuperset(reader.outputs):
                yield f"{tensor!r}, {fate}, is also read by {reader}"
        if tensor in decoder.graph.outputs and tensor not in candidate.cache_outputs:
            yield f"{tensor!r}, {fate}, is an output of the model"


def _own(candidate: Candidate, all_gone: set[str]) -> Iterator[str]:
    """Operands of a candidate that vanish themselves; a `cross` one needs keys and values only while it is filled."""
    for name in _needed_each_step(candidate) if candidate.kind == CROSS else operands(candidate):
        if name in all_gone:
            yield f"{name!r}, {_fate(candidate)}, is an operand of the attention"


def _fate(candidate: Candidate) -> str:
    crossed = candidate.kind == CROSS
    return "which a step leaves empty once the cache is stored" if crossed else "which would vanish with the cache"


def _needed_each_step(candidate: Candidate) -> list[str]:
    terms = [term.tensor for term in candidate.mask]
    extra = [name for part in candidate.prologue if isinstance(part, NewNode) for name in part.inputs]
    return [name for name in (candidate.query.tensor, candidate.head_sink, *terms, *extra) if name]
