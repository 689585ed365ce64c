"""Which keys a mask hides, where that can be proven: causal, windowed and padded parts become facts of the site.

A term that hides exactly the keys after the query, those `window` or more before it, and those whose element of a
(batch, tokens) input is 0, becomes attributes and a mask of shape (B, 1, 1, T); any other term stays a tensor. Rows
that see at least one key keep their result to rounding; a row that sees none is padding, whose result nobody reads,
but which must not become NaN where the original's finite fill kept it finite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...graph import Dim, symbol
from ...graph.symbolic.dims import TooComplexError
from ..caches import PAST_LENGTH, DecoderGraph
from ..matching.scores import least_fill
from ..prologue import Prologue
from ..site import LARGEST_FLOAT32, SCORES, SIZE_1, Added, Filled, MaskTerm, Site, joined, letters
from .predicates import (
    NEVER,
    AtMostZero,
    InputElement,
    Literal,
    Predicate,
    UnreadableError,
    affine,
    composed,
    equivalent,
)
from .reader import MaskReader

ABSENT, QUERY, KEY = -1, 2, 3
PLAIN = frozenset((*SCORES, SIZE_1))


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a term hides: keys after the query, keys outside a window, elements of an input that are 0; and its fill."""

    causal: bool
    window: int
    padding: str
    fill: float


def with_mask_facts(decoder: DecoderGraph, reader: MaskReader, site: Site) -> Site:
    """The site with every term that is understood turned into attributes and padding."""
    new_tokens, prologue = _new_tokens(decoder, site), Prologue(decoder.graph)
    terms: list[MaskTerm] = []
    causal, window, hard = site.is_causal, site.window, True
    least = least_fill(decoder.element(site.query.tensor, site.element))
    for term in (part for whole in site.mask for part in _parts(decoder, reader, whole)):
        hidden = _hidden(decoder, reader, term, least)
        unbound = hidden is not None and hidden.window and not (hidden.causal or causal)
        if hidden is None or unbound or (hidden.padding and new_tokens is None):
            terms.append(term)
            continue
        causal = causal or hidden.causal
        hard = hard and not (abs(hidden.fill) <= LARGEST_FLOAT32 and (hidden.causal or hidden.window))
        window = min((w for w in (window, hidden.window) if w), default=0)
        if hidden.padding and new_tokens is not None:
            terms.append(Filled(_unpadded(prologue, hidden.padding, new_tokens), keep=True, fill=hidden.fill))
    return replace(
        site,
        mask=tuple(terms),
        is_causal=causal,
        window=window,
        nan_to_zero=site.nan_to_zero or not (hard or all(map(_is_finite, terms))),
        prologue=(*site.prologue, *prologue.parts),
    )


def _is_finite(term: MaskTerm) -> bool:
    return isinstance(term, Filled) and abs(term.factor * term.fill) <= LARGEST_FLOAT32


def _parts(decoder: DecoderGraph, reader: MaskReader, term: MaskTerm) -> list[MaskTerm]:
    """The terms that an Add joined, if one of them can be read where the sum can't."""
    node = decoder.graph.producer(term.tensor) if isinstance(term, Added) else None
    if not isinstance(term, Added) or node is None or node.op != "Add" or _readable(reader, term):
        return [term]
    axes, parts = letters(term.layout), list[MaskTerm]()
    for name in node.inputs:
        rank = decoder.shapes.rank(name)
        if rank is None or not {*axes} <= PLAIN:
            return [term]
        parts.append(replace(term, tensor=name, layout=joined(axes[len(axes) - rank :])))
    return parts if any(isinstance(part, Added) and _readable(reader, part) for part in parts) else [term]


def _readable(reader: MaskReader, term: Added) -> bool:
    try:
        reader.cases(term.tensor)
    except (UnreadableError, TooComplexError):
        return False
    return True


def _unpadded(prologue: Prologue, tensor: str, new_tokens: tuple[str, int]) -> str:
    """Where the first T elements of each row of (B, T or more) are not 0, as (B, 1, 1, T)."""
    total = prologue.node("Add", PAST_LENGTH, prologue.size(*new_tokens))
    first = prologue.node("Slice", tensor, prologue.constant(0), total, prologue.constant(1))
    return prologue.unsqueeze(prologue.bool(first), 1, 2)


def _new_tokens(decoder: DecoderGraph, site: Site) -> tuple[str, int] | None:
    """An axis of a graph input, not a cache, that is as long as the new tokens."""
    terms = [(term.tensor if isinstance(term, Added) else term.condition, term.layout) for term in site.mask]
    caches = {cache.input for cache in decoder.caches.values()}
    for tensor, layout in ((site.query.tensor, site.query.layout), *terms):
        shape, axes = decoder.shapes.shape(tensor), letters(layout)
        size = None if shape is None or "S" not in axes else shape[axes.index("S")]
        places = decoder.shapes.sources.get(size.name or "", ()) if isinstance(size, Dim) else ()
        for place in places:
            if place.is_size and place.tensor in decoder.graph.inputs and place.tensor not in caches:
                return place.tensor, place.place
    return None


def _hidden(decoder: DecoderGraph, reader: MaskReader, term: MaskTerm, least_fill: float) -> Hidden | None:
    sizes = decoder.shapes.shape(term.tensor if isinstance(term, Added) else term.condition)
    lies = letters(term.layout)
    if sizes is None or not {*lies} <= PLAIN:
        return None
    try:
        if isinstance(term, Filled):
            seen = reader.predicate(term.condition)
            hides, fill = (seen.negated() if term.keep else seen), term.fill * term.factor
        else:
            hides, fill = _filled(reader, term)
        axes = {axis: SCORES.find(letter) for axis, letter in enumerate(lies)}
        alike = {old for old, new in axes.items() if new in (ABSENT, QUERY, KEY) and sizes[old] == 1}
        where = composed(hides, {old: affine(0, {} if old in alike else {new: 1}) for old, new in axes.items()})
    except (UnreadableError, TooComplexError):
        return None
    return _facts(where, fill) if isinstance(where, Predicate) and fill <= least_fill else None


def _filled(reader: MaskReader, term: Added) -> tuple[Predicate, float]:
    """Where a float mask is not 0, and the one value that it has there."""
    where, fills = NEVER, set()
    for case, element, factor, offset in reader.cases(term.tensor).values:
        if element is not None and factor:
            raise UnreadableError(term.tensor)
        if offset:
            where = where.or_(case)
            fills.add(offset * term.factor)
    if len(fills) != 1:
        raise UnreadableError(term.tensor)
    return where, fills.pop()


def _facts(where: Predicate, fill: float) -> Hidden | None:
    facts: dict[str, Any] = {"causal": False, "window": 0, "padding": ""}
    whole = NEVER
    for literal in {x for case in where.cases for known in case for x in (known, known.negated())}:
        fact = _fact(literal)
        if fact is None:
            continue
        if facts[fact[0]]:
            return None
        facts[fact[0]] = fact[1]
        whole = whole.or_(Predicate(frozenset({frozenset({literal})})))
    return Hidden(**facts, fill=fill) if whole != NEVER and equivalent(where, whole) else None


def _fact(literal: Literal) -> tuple[str, Any] | None:
    past = symbol(PAST_LENGTH)
    if isinstance(literal, InputElement):
        at_key = (affine(0, {0: 1}), affine(0, {KEY: 1}))
        return ("padding", literal.tensor) if literal.zero and literal.index == at_key else None
    if literal == AtMostZero(affine(past + 1, {QUERY: 1, KEY: -1})):  # past + query + 1 <= key
        return "causal", True
    window = literal.of.const + past
    if isinstance(window, int) and window > 0 and literal == AtMostZero(affine(window - past, {QUERY: -1, KEY: 1})):
        return "window", window
    return None
