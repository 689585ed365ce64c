"""From a proven view of a cache to the op's operand: the new tokens, and how they lie."""

from __future__ import annotations

from ..graph import Node
from .decoder import Decoder
from .layout import REPEAT, CacheView
from .site import MissError, Operand


def cache_operand(view: CacheView, reader: Node, tokens_last: bool) -> Operand:
    """Where the new tokens come from, after proving that its reader takes (B, H, tokens, D) or its transpose."""
    tokens = view.cache.axis
    names = view.names()
    heads_axes, (head_size, token) = names[:-2], (names[-2:] if tokens_last else names[-2:][::-1])
    if token != (tokens,) or len(head_size) != 1 or head_size[0] in (REPEAT, 0):
        raise MissError(
            f"{reader}: expected the cache {view.cache.input!r} with its tokens on axis {-1 if tokens_last else -2} "
            "and whole heads beside it, got another order of axes"
        )
    heads = ({1, 2, 3} - {tokens, head_size[0]}).pop()
    sizes = {atom.axis: atom.size for axis in view.axes for atom in axis}
    expected = [a for a in (0, heads, REPEAT) if sizes.get(a, 1) != 1]
    if [a for axis in heads_axes for a in axis] != expected or (len(heads_axes) == 2 and set(heads_axes[0]) - {0}):
        raise MissError(
            f"{reader}: expected batch and heads of {view.cache.input!r} in this order, each head repeated for "
            "consecutive query heads, got another order"
        )
    letters = {0: "B", heads: "H", tokens: "S", head_size[0]: "D"}
    return Operand(view.cache.new, "".join(letters[i] for i in range(4)))


def cache_sizes(decoder: Decoder, view: CacheView, operand: Operand) -> tuple[int, int | None]:
    """Heads of a cache, and its head size if that is declared."""
    shape = decoder.shapes.shape(view.cache.input) or ()
    heads, size = shape[operand.layout.index("H")], shape[operand.layout.index("D")]
    if not isinstance(heads, int):
        raise MissError(
            f"cache {view.cache.input!r}: the number of heads is not known; declare it in the input's shape"
        )
    return heads, size if isinstance(size, int) else None
