"""From a proven view of a cache to the op's operand: the new tokens, and how they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...graph import Node
from ..caches import CacheTensor
from ..decoder_graph import DecoderGraph
from ..match import MissError, Operand
from .cache_view import REPEAT, Atom, Axes, CacheView

Letters = Mapping[int | str, str]

NEW_TOKENS = {"B": "B", "K": "H", "T": "S", "D": "D"}


def cache_letters(view: CacheView, reader: Node, token_axis: int, size_axis: int) -> Letters:
    """Layout letter of each axis of the cache, after proving that these axes of the view are its tokens and size."""
    tokens, names = view.cache.axis, view.names()
    size = names[size_axis]
    if tokens == 0 or names[token_axis] != (tokens,) or len(size) != 1 or size[0] in (REPEAT, 0, tokens):
        raise MissError(
            f"{reader}: expected the cache {view.cache.input!r} with its tokens on axis {token_axis - len(names)} "
            "and whole heads beside it, got another order of axes"
        )
    (heads,) = {1, 2, 3} - {tokens, *size}
    return {0: "B", heads: "K", REPEAT: "G", tokens: "T", size[0]: "D"}


def order_error(view: CacheView, reader: Node) -> MissError:
    """That the axes beside tokens and size don't lie as the op has them."""
    return MissError(
        f"{reader}: expected batch and heads of {view.cache.input!r} in this order, each head repeated for "
        "consecutive query heads, got another order"
    )


def new_tokens(view: CacheView, letters: Letters) -> Operand:
    """The new tokens of a cache, as they lie when they are joined."""
    return Operand(view.cache.new, "".join(NEW_TOKENS[letters[axis]] for axis in view.cache.order))


def lettered(view: CacheView, letters: Letters) -> Axes:
    """The view's axes in layout letters, sizes of 1 left out."""
    return tuple(tuple(Atom(letters[atom.axis], atom.size) for atom in axis if atom.size != 1) for axis in view.axes)


def cache_operand(view: CacheView, reader: Node) -> Operand:
    """Where the new tokens come from, after proving that its reader takes (B, H, tokens, D)."""
    letters = cache_letters(view, reader, len(view.axes) - 2, len(view.axes) - 1)
    lies = [[atom.axis for atom in axis] for axis in lettered(view, letters)[:-2]]
    flat = [letter for axis in lies for letter in axis]
    if flat != [letter for letter in "BKG" if letter in flat] or (len(lies) == 2 and {*lies[0]} - {"B"}):
        raise order_error(view, reader)
    return new_tokens(view, letters)


def head_sizes(
    decoder: DecoderGraph, caches: Sequence[CacheTensor], layouts: Sequence[str], q_heads: int | None = None
) -> tuple[int, int | None, int | None]:
    """Heads, and head sizes where declared, of two caches whose joined tensors lie so. Raises MissError if they differ.

    q_heads: those that share them, if known.
    """
    (kv_heads, k_size), (v_heads, v_size) = (
        _sizes(decoder, cache, layout) for cache, layout in zip(caches, layouts, strict=True)
    )
    if q_heads is None and kv_heads != v_heads:
        raise MissError(f"keys have {kv_heads} heads, values {v_heads}; expected the same")
    if q_heads is not None and (kv_heads != v_heads or q_heads % kv_heads):
        raise MissError(f"{q_heads} query heads, {kv_heads} key heads, {v_heads} value heads; expected multiples")
    return kv_heads, k_size, v_size


def _sizes(decoder: DecoderGraph, cache: CacheTensor, layout: str) -> tuple[int, int | None]:
    shape = decoder.shapes.shape(cache.input) or ()
    heads, size = (shape[cache.order[layout.index(letter)]] for letter in "HD")
    if not isinstance(heads, int):
        raise MissError(f"cache {cache.input!r}: the number of heads is not known; declare it in the input's shape")
    return heads, size if isinstance(size, int) else None
