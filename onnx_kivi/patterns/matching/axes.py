"""What the axes of queries, scores and results are: batch, kv heads, query heads per kv head, tokens, head size.

Known by the cache that a product reads; followed through reshapes up to the product with the values, which must mean
the same by each axis. Letters as in `site`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ...graph import Dim, Node, Shape, divide
from ..decoder_graph import DecoderGraph
from ..layouts import SCORES, SIZE_1, joined
from ..match import MissError
from .cache_view import Atom, Axes, CacheView, regroup
from .contraction import Contraction
from .operands import Letters, cache_letters, lettered, order_error

ORDER = "BKGST"
UNCOUNTED = {"B", "S", "T", "D"}

Axis = tuple[Atom, ...]


@dataclass(frozen=True, slots=True)
class Sign:
    """What shows that an axis which only the query has is that of the tokens: its size beside that of the new ones.

    needed_by: models that show no other; those of models/zoo show any.
    """

    meaning: str
    needed_by: str
    shows: Callable[[int | Dim, int | Dim | None], bool]


TOKENS_SIGNS = (
    Sign(
        "as many as there are new tokens",
        "an Einsum over tokens first (bskgd) with fixed numbers of tokens and of query heads",
        lambda size, new: size == new,
    ),
    Sign(
        "no fixed number, as query heads have",
        "inputs that call the same number of tokens by names of their own",
        lambda size, _: isinstance(size, Dim),
    ),
    Sign(
        "some times a fixed number of new tokens",
        "query heads folded into the rows of one product, with a fixed number of tokens",
        lambda size, new: new != 1 and isinstance(_times(size, new), int),
    ),
)


def _times(size: int | Dim, new: int | Dim | None) -> int | Dim | None:
    return None if new is None else divide(size, new)


def key_letters(product: Contraction, keys: CacheView) -> Letters:
    """Letters of the key cache's axes, summed over the head size."""
    places = product.right_labels.index
    return cache_letters(keys, product.node, places(product.free), places(product.summed))


def value_letters(product: Contraction, values: CacheView) -> Letters:
    """Letters of the value cache's axes, summed over the tokens."""
    places = product.right_labels.index
    return cache_letters(values, product.node, places(product.summed), places(product.free))


def query_and_scores(
    decoder: DecoderGraph, product: Contraction, keys: CacheView, letters: Letters
) -> tuple[Axes, Axes]:
    """Axes of the query and of the scores. Raises MissError unless the scores lie in the order of `ORDER`."""
    theirs = dict(zip(product.right_labels, lettered(keys, letters), strict=True))
    sizes = dict(zip(product.left_labels, decoder.shapes.shape(product.left) or (), strict=True))
    ours: dict[str, Axis] = {product.summed: (Atom("D", sizes[product.summed]),)}
    rows: dict[str, int | Dim] = {}
    for label in product.left_labels:
        if label == product.summed:
            continue
        if theirs.get(label):
            ours[label] = _shared(product.node, theirs[label], sizes[label])
        elif sizes[label] == 1:
            ours[label] = ()
        else:
            rows[label] = sizes[label]
    new = decoder.shapes.shape(keys.cache.new)
    ours |= _rows(product.node, rows, None if new is None else new[keys.cache.new_axis])
    scores = tuple(theirs[label] if label == product.free else ours[label] for label in product.labels)
    flat = [atom.axis for axis in scores for atom in axis]
    if flat != [letter for letter in ORDER if letter in flat] or [atom.axis for atom in scores[-1]] != ["T"]:
        raise order_error(keys, product.node)
    return tuple(ours[label] for label in product.left_labels), scores


def _shared(node: Node, axis: Axis, size: int | Dim) -> Axis:
    """The key's axis, which the query's must match in size."""
    expected = math.prod(atom.size for atom in axis)
    counted = all(atom.axis not in UNCOUNTED for atom in axis)
    if counted and not isinstance(expected, int):
        raise MissError(f"{node}: the number of key heads it reads is not known")
    if counted and not isinstance(size, int):
        raise MissError(f"{node}: the number of query heads is not known")
    if size != expected and isinstance(size, int) and isinstance(expected, int):
        raise MissError(f"{node}: {size} query heads meet {expected} key heads; expected as many")
    return axis


def _rows(node: Node, rows: Mapping[str, int | Dim], new: int | Dim | None) -> dict[str, Axis]:
    """Axes that only the query has: tokens, as many as are `new`, and query heads, or both on one axis."""
    tokens = _tokens_label(rows, new)
    found: dict[str, Axis] = {}
    for label, size in rows.items():
        group = _times(size, new)
        if label != tokens and not isinstance(size, int):
            raise MissError(f"{node}: an axis of {size} that only the query has; expected query heads, a known number")
        if label != tokens:
            found[label] = (Atom("G", size),)
        elif isinstance(group, int) and group > 1 and new is not None:
            found[label] = (Atom("G", group), Atom("S", new))
        else:
            found[label] = (Atom("S", size),)
    return found


def _tokens_label(rows: Mapping[str, int | Dim], new: int | Dim | None) -> str:
    """The axis of the tokens, "" if it has size 1: the last of those that show the first sign that any shows."""
    for sign in TOKENS_SIGNS:
        labels = [label for label, size in rows.items() if sign.shows(size, new)]
        if labels:
            return labels[-1]
    return ""


def followed(decoder: DecoderGraph, nodes: Iterable[Node], start: str, axes: Axes) -> dict[str, Axes]:
    """Axes of every tensor that the nodes, in order, make of `start`. Raises MissError if one is not proven."""
    known = {start: axes}
    for node in nodes:
        source = next((name for name in node.inputs if name in known), None)
        if source is None:
            continue
        shape = decoder.shapes.shape(node.outputs[0])
        if node.op == "Reshape":
            if shape is None:
                raise MissError(f"{node}: the shape it makes is not known")
            known[node.outputs[0]] = regroup(node, known[source], shape)
        elif shape is not None and len(shape) != len(known[source]):
            raise MissError(f"{node}: {len(known[source])} axes become {len(shape)}; expected as many")
        else:
            known[node.outputs[0]] = known[source]
    return known


def check_sums_to_one(softmax: Node, logits: Axes) -> None:
    """Raise MissError unless the last axis, over which the softmax runs, holds the tokens and nothing else."""
    last = [atom.axis for atom in logits[-1]]
    if last != ["T"]:
        raise MissError(
            f"{softmax}: softmax over the axes {''.join(map(str, last))} merged into one; expected T, alone"
        )


def result(product: Contraction, values: CacheView, letters: Letters, weights: Axes) -> Axes:
    """Axes of weights times values. Raises MissError unless each head's weights meet its own values."""
    theirs = dict(zip(product.right_labels, lettered(values, letters), strict=True))
    ours = dict(zip(product.left_labels, weights, strict=True))
    if [atom.axis for atom in ours[product.summed]] != ["T"]:
        raise MissError(f"{product.node}: expected a sum over the tokens of the cache, got one over other axes")
    for label, axis in ours.items():
        met = theirs.get(label, ())
        alone = not met and not any(atom.axis in ("B", "K") for atom in axis)
        if label != product.summed and not alone and not _same(axis, met):
            raise order_error(values, product.node)
    return tuple(theirs[label] if label == product.free else ours[label] for label in product.labels)


def _same(axis: Axis, met: Axis) -> bool:
    sizes = zip(axis, met, strict=False)
    return [a.axis for a in axis] == [b.axis for b in met] and all(a.size == b.size for a, b in sizes if a.axis == "G")


def group_size(node: Node, scores: Axes) -> int:
    """Query heads of each kv head."""
    size = math.prod(atom.size for axis in scores for atom in axis if atom.axis == "G")
    if not isinstance(size, int):
        raise MissError(f"{node}: the number of key heads it reads is not known")
    return size


def spelled(node: Node, axes: Axes, last: str) -> str:
    """The layout of axes that end, in the op's order, with the letter `last`."""
    return _layout(node, _texts(axes), last)


def spelled_term(node: Node, scores: Axes, shape: Shape) -> str:
    """The layout of a mask term of this shape that is broadcast to scores with these axes."""
    texts = _texts(scores)
    wide = [math.prod(atom.size for atom in axis) for axis in scores]
    out = []
    for text, size, full in list(zip(texts[::-1], shape[::-1], wide[::-1], strict=False))[::-1]:
        if text in ("K", "G") and size not in (1, full):
            raise MissError(f"{node}: a mask axis of {size} where the scores have {full}; expected 1 or as many")
        out.append("" if size == 1 and text not in SCORES else text)
    return _layout(node, out, "T")


def _texts(axes: Axes) -> list[str]:
    """Letters of each axis; H where kv heads and their query heads are not on two axes."""
    texts = ["".join(str(atom.axis) for atom in axis).replace("KG", "H") for axis in axes]
    if {"K", "G"} <= {*"".join(texts)}:
        return texts
    return [text.replace("K", "H").replace("G", "H") for text in texts]


def _layout(node: Node, texts: Sequence[str], last: str) -> str:
    flat = "".join(texts)
    missing = [letter for letter in f"BHS{last}" if letter not in flat and not (letter == "H" and {*"KG"} & {*flat})]
    out = []
    for text in texts:
        if len(UNCOUNTED & {*text}) > 1:
            raise MissError(f"{node}: axes {text} merged into one can't be told apart; expected them apart")
        out.append(text or (missing.pop(0) if missing else SIZE_1))
    return joined(out)
