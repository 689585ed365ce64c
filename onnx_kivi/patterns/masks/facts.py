"""Which keys a mask hides, where that can be proven: causal, windowed and padded parts become facts of the site.

A term that hides exactly the keys after the query, those `window` or more before it, and those whose element of a
(batch, tokens) input is 0, becomes attributes and a mask of shape (B, 1, 1, T); any other term stays a tensor. Rows
that see at least one key keep their result to rounding; a row that sees none is padding, whose result nobody reads,
but which must not become NaN where the original's finite fill kept it finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...graph import Shape, TooComplexError, symbol
from ..decoder_graph import PAST_LENGTH, DecoderGraph
from ..layouts import SCORES, SIZE_1, joined, letters
from ..match import LARGEST_FLOAT32, Added, Filled, MaskTerm, Match
from ..matching.scores import least_fill
from ..prologue import Prologue
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

NO_AXIS, QUERY_AXIS, KEY_AXIS = -1, 2, 3
PLAIN = frozenset((*SCORES, SIZE_1))

AMatch = TypeVar("AMatch", bound=Match)


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a term hides: keys after the query, keys outside a window, elements of an input that are 0; and its fill."""

    causal: bool
    window: int
    padding: str
    fill: float

    @property
    def is_finite(self) -> bool:
        """Whether float32 holds the fill, so that a row of nothing else is no NaN."""
        return abs(self.fill) <= LARGEST_FLOAT32


@dataclass(frozen=True, slots=True)
class BlindRow:
    """What is known of a row that sees no key.

    zeroed: the original makes zeros of it. hardened: a finite fill becomes an attribute, which hides with -inf.
    rest_is_finite: so are all terms that stay.
    """

    zeroed: bool
    hardened: bool
    rest_is_finite: bool


@dataclass(frozen=True, slots=True)
class BlindRowRule:
    """A case, and whether the op must then make zeros of a row that is NaN. needed_by: whose models have it."""

    case: str
    needed_by: str
    applies: Callable[[BlindRow], bool]
    nan_to_zero: bool


# The first that applies decides.
BLIND_ROWS = (
    BlindRowRule(
        "the original makes zeros of NaN, or has no -inf",
        "torch's dynamo exporter (scaled_dot_product_attention), ai.onnx Attention, optimum's floored masks",
        lambda row: row.zeroed,
        True,
    ),
    BlindRowRule(
        "it is hidden by what hid it before",
        "onnxruntime-genai's GroupQueryAttention, masks of -inf",
        lambda row: not row.hardened,
        False,
    ),
    BlindRowRule(
        "it keeps a finite mask beside the attributes, or sees itself",
        "torch's exporters with eager attention: causal and padding in one finite mask",
        lambda row: row.rest_is_finite,
        False,
    ),
    BlindRowRule(
        "-inf may hide all of it, where a finite fill kept it finite",
        "optimum's bloom and t5: a tensor of biases is added beside the mask",
        lambda _: True,
        True,
    ),
)


def with_mask_facts(decoder: DecoderGraph, reader: MaskReader, match: AMatch) -> AMatch:
    """The match with every term that is understood turned into attributes and padding."""
    new_tokens, prologue = _new_tokens(decoder, match), Prologue(decoder.graph)
    terms = [part for whole in match.mask for part in _parts(decoder, reader, whole)]
    hidden = _understood(decoder, reader, match, terms, can_pad=new_tokens is not None)
    facts = [fact for fact in hidden if fact is not None]
    mask: list[MaskTerm] = []
    for term, fact in zip(terms, hidden, strict=True):
        if fact is None:
            mask.append(term)
        elif fact.padding and new_tokens is not None:
            mask.append(Filled(_unpadded(prologue, fact.padding, new_tokens), keep=True, fill=fact.fill))
    return replace(
        match,
        mask=tuple(mask),
        is_causal=match.is_causal or any(fact.causal for fact in facts),
        window=min((w for w in (match.window, *(fact.window for fact in facts)) if w), default=0),
        nan_to_zero=_nan_to_zero(match, facts, mask),
        prologue=(*match.prologue, *prologue.parts),
    )


def _understood(
    decoder: DecoderGraph, reader: MaskReader, match: Match, terms: list[MaskTerm], *, can_pad: bool
) -> list[Hidden | None]:
    """What each term hides, where the op can do it in the term's place: it has windows of causal masks only."""
    least = least_fill(decoder.element(match.query.tensor, match.element))
    hidden = [_hidden(decoder, reader, term, least) if _is_of_scores(decoder, match, term) else None for term in terms]
    possible = [fact if fact is not None and (can_pad or not fact.padding) else None for fact in hidden]
    causal = match.is_causal or any(fact.causal for fact in possible if fact is not None)
    return [fact if fact is not None and (causal or not fact.window) else None for fact in possible]


def _nan_to_zero(match: Match, facts: list[Hidden], rest: list[MaskTerm]) -> bool:
    row = BlindRow(
        zeroed=match.nan_to_zero,
        hardened=any(fact.is_finite and (fact.causal or fact.window) for fact in facts),
        rest_is_finite=all(map(_is_finite, rest)),
    )
    return next(rule.nan_to_zero for rule in BLIND_ROWS if rule.applies(row))


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
    first = prologue.node("Slice", tensor, prologue.ints(0), total, prologue.ints(1))
    return prologue.unsqueeze(prologue.cast(first, "bool"), 1, 2)


def _new_tokens(decoder: DecoderGraph, match: Match) -> tuple[str, int] | None:
    """An axis of a graph input, not a cache, that is as long as the new tokens."""
    terms = [(term.tensor, term.layout) for term in match.mask]
    for tensor, layout in ((match.query.tensor, match.query.layout), *terms):
        axes = letters(layout)
        place = decoder.on_input(tensor, axes.index("S")) if "S" in axes else None
        if place is not None:
            return place
    return None


def _is_of_scores(decoder: DecoderGraph, match: Match, term: MaskTerm) -> bool:
    """Whether a term's rows may be the queries and its columns the keys: where they are as many as something else, the
    one of a lone sequence or token would serve all of them alike."""
    sizes, query = decoder.shapes.shape(term.tensor), decoder.shapes.shape(match.query.tensor)
    if sizes is None or query is None:
        return True
    rows, columns = (_size(decoder, term.tensor, term.layout, sizes, letter) for letter in "ST")
    batch, tokens = (_size(decoder, match.query.tensor, match.query.layout, query, letter) for letter in "BS")
    return (tokens is None or rows in (None, tokens)) and (columns is None or columns not in (batch, tokens))


def _size(decoder: DecoderGraph, tensor: str, layout: str, sizes: Shape, letter: str) -> object:
    """Size of an axis, if it is one of a graph input that is no cache; else None."""
    for size, own, axis in zip(sizes, letters(layout), range(len(sizes)), strict=False):
        if own == letter:
            return size if decoder.on_input(tensor, axis) is not None else None
    return None


def _hidden(decoder: DecoderGraph, reader: MaskReader, term: MaskTerm, least_fill: float) -> Hidden | None:
    sizes = decoder.shapes.shape(term.tensor)
    lies = letters(term.layout)
    if sizes is None or not {*lies} <= PLAIN:
        return None
    try:
        if isinstance(term, Filled):
            seen = reader.predicate(term.tensor)
            hides, fill = (seen.negated() if term.keep else seen), term.fill * term.factor
        else:
            hides, fill = _filled(reader, term)
        axes = {axis: SCORES.find(letter) for axis, letter in enumerate(lies)}
        alike = {old for old, new in axes.items() if new in (NO_AXIS, QUERY_AXIS, KEY_AXIS) and sizes[old] == 1}
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
        at_key = (affine(0, {0: 1}), affine(0, {KEY_AXIS: 1}))
        return ("padding", literal.tensor) if literal.zero and literal.index == at_key else None
    if literal == AtMostZero(affine(past + 1, {QUERY_AXIS: 1, KEY_AXIS: -1})):  # past + query + 1 <= key
        return "causal", True
    window = literal.of.const + past
    outside = AtMostZero(affine(window - past, {QUERY_AXIS: -1, KEY_AXIS: 1}))
    return ("window", window) if isinstance(window, int) and window > 0 and literal == outside else None
