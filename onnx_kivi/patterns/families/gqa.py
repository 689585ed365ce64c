"""com.microsoft GroupQueryAttention: past and present inside, heads merged or packed with keys and values.

The node counts each row's tokens by `seqlens_k` (total - 1, new ones included) and pads on the right; our cache keeps
padding where it was fed, so it is masked out of later steps, by the (B, T) mask that seqlens_k was summed from. Rows of
different lengths that can't be told apart in this way, or under a window, give NaN rather than something else.
Source: ContribOperators.md; the CPU kernel (positions, order of softcap, bias and window).
"""

from __future__ import annotations

from typing import Any

from ...graph import Node
from ..caches import CacheTensor, Port, Ports
from ..decoder_graph import DecoderGraph
from ..match import Added, MaskTerm, Match, MissError, Operand
from ..matching.contrib import contrib_scale, joined_cache, refuse
from ..matching.softmax import reduced_axes
from ..prologue import CONTRIB, Prologue

FAMILY = "gqa"
ANCHORS = ("com.microsoft.GroupQueryAttention",)
PORTS: Ports = {ANCHORS[0]: (Port(3, 1, 2, fixed="sliding_window_cache"), Port(4, 2, 2, fixed="sliding_window_cache"))}

QUERY, KEY, VALUE, PAST_KEY, PAST_VALUE, SEQLENS, TOTAL, COS, SIN, POSITIONS, BIAS, SINK = range(12)
REFUSED_INPUTS = {
    12: "the scale of its own quantized keys",
    13: "the scale of its own quantized values",
    14: "a norm of the queries",
    15: "a norm of the keys",
    16: "the lengths of a padded chunk",
}
KEEPS_NUMBERS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten")
PADDING_MOVED = "padding_must_follow_the_prompt_and_stay_there"
BEYOND_TABLE = "positions_must_lie_within_the_rotary_table"
PADDED_ROWS = "rows_must_be_of_one_length"
LOWEST = -3.4028234663852886e38
NO_WINDOW = -1


def match(decoder: DecoderGraph, node: Node) -> Match | None:
    """The match of a GroupQueryAttention node; None if it reads no cache."""
    keys, values = joined_cache(decoder, node, PAST_KEY, 1), joined_cache(decoder, node, PAST_VALUE, 2)
    if keys is None or values is None:
        return None
    refuse(node, REFUSED_INPUTS, {3: "the scores"})
    if not node.flag("causal", 1):
        raise MissError("causal=0: expected new tokens to see those before them only")
    q_heads, kv_heads = node.count("num_heads"), node.count("kv_num_heads")
    head_size = _head_size(decoder, node, keys, q_heads, kv_heads)
    window = _window(node)
    prologue = Prologue(decoder.graph)
    query, key, value = _operands(decoder, prologue, node, head_size)
    sink = _sink(prologue, node, q_heads)
    mask = _mask(decoder, prologue, node, window)
    return Match(
        query=Operand(query),
        key=Operand(key),
        value=Operand(value),
        output=Operand(node.outputs[0], "BS(HD)"),
        caches=(keys, values),
        nodes=frozenset({node.index}),
        q_heads=q_heads,
        kv_heads=kv_heads,
        k_head_size=head_size,
        v_head_size=head_size,
        scale=contrib_scale(node, head_size),
        mask=mask,
        head_sink=sink,
        softcap=node.real("softcap", 0.0),
        is_causal=True,
        window=window,
        prologue=prologue.parts,
        capacity=window if node.flag("sliding_window_cache") else 0,
        pads_right=True,
    )


def _window(node: Node) -> int:
    """Tokens that a query sees, itself among them; 0 = all."""
    window = node.whole("local_window_size", NO_WINDOW)
    if window != NO_WINDOW and window < 1:
        raise MissError(f"local_window_size: expected {NO_WINDOW} or at least 1, got {window}")
    return max(window, 0)


def _sink(prologue: Prologue, node: Node, q_heads: int) -> str:
    """The sink logits, which smooth_softmax has at 0."""
    smooth = not node.input(SINK) and node.attr("smooth_softmax", -1) == 1
    return prologue.floats(*[0.0] * q_heads) if smooth else node.input(SINK)


def _mask(decoder: DecoderGraph, prologue: Prologue, node: Node, window: int) -> tuple[MaskTerm, ...]:
    padding, bias = Added(_padding(decoder, prologue, node, window)), node.input(BIAS)
    return (padding, Added(bias)) if bias else (padding,)


def _head_size(decoder: DecoderGraph, node: Node, keys: CacheTensor, q_heads: int, kv_heads: int) -> int | None:
    heads = q_heads if node.input(KEY) else q_heads + 2 * kv_heads
    hidden = decoder.last_size(node.inputs[QUERY])
    return decoder.last_size(keys.input) if hidden is None else hidden // heads


def _operands(decoder: DecoderGraph, prologue: Prologue, node: Node, head_size: int | None) -> tuple[str, str, str]:
    """Query, key and value as (B, H, S, D), turned by their positions if the node does that."""
    q_heads, kv_heads = node.count("num_heads"), node.count("kv_num_heads")
    heads = (q_heads, kv_heads, kv_heads)
    if node.input(KEY):
        query, key, value = (prologue.heads_first(name, n) for name, n in zip(node.inputs[:3], heads, strict=True))
    else:
        query, key, value = prologue.split(prologue.heads_first(node.inputs[QUERY], sum(heads)), 1, *heads)
    if node.flag("do_rotary"):
        query, key = _rotated(decoder, prologue, node, (query, key), head_size)
    return query, key, value


def _rotated(
    decoder: DecoderGraph, prologue: Prologue, node: Node, tensors: tuple[str, str], head_size: int | None
) -> tuple[str, str]:
    """Query and key turned by their positions, as a RotaryEmbedding node does it."""
    table = decoder.shapes.shape(node.input(COS))
    pairs = table[1] if table and len(table) == 2 else None
    if not isinstance(pairs, int) or head_size is None or not node.input(SIN):
        raise MissError("do_rotary: the sizes of cos_cache and of the heads are not known")
    tables = (_checked(prologue, _positions(prologue, node), node.inputs[COS]), node.inputs[COS], node.inputs[SIN])
    interleaved = int(node.flag("rotary_interleaved"))

    def turned(tensor: str, heads: int) -> str:
        partial: dict[str, Any] = {"rotary_embedding_dim": pairs * 2, "num_heads": heads}
        more = {} if pairs * 2 == head_size else partial
        return prologue.node("RotaryEmbedding", tensor, *tables, domain=CONTRIB, interleaved=interleaved, **more)

    return turned(tensors[0], node.count("num_heads")), turned(tensors[1], node.count("kv_num_heads"))


def _checked(prologue: Prologue, positions: str, table: str) -> str:
    """The positions, which older RotaryEmbedding kernels look up beyond the table's end as well."""
    within = prologue.node("Less", positions, prologue.size(table, 0))
    return prologue.node("Add", positions, prologue.cast(prologue.require(within, BEYOND_TABLE), "int64"))


def _positions(prologue: Prologue, node: Node) -> str:
    """(B, S): those given (of a first prompt only the very first counts), or on from what each row holds.

    A prompt that is shorter than S is padded behind its tokens, unless new_length says that these are the last.
    """
    counted_S = prologue.counted(prologue.size(node.inputs[QUERY], 1))
    given = node.input(POSITIONS)
    if given:
        first = prologue.node("Slice", given, prologue.ints(0, 0), prologue.ints(1, 1))
        of_prompt = prologue.node("Add", first, counted_S)
        is_prompt = prologue.node("And", _is_prompt(prologue), prologue.takes_all())
        return prologue.node("Where", is_prompt, of_prompt, given)
    before_B1 = prologue.node("Sub", _lengths(prologue, node), prologue.size(node.inputs[QUERY], 1))
    held_B1 = prologue.node("Max", before_B1, prologue.ints(0))
    first_B1 = prologue.node("Where", prologue.takes_all(), held_B1, before_B1)
    return prologue.node("Max", prologue.node("Add", first_B1, counted_S), prologue.ints(0))


def _is_prompt(prologue: Prologue) -> str:
    """Whether a row holds nothing yet, (R, 1)."""
    return prologue.node("Equal", prologue.row_past(), prologue.ints(0))


def _lengths(prologue: Prologue, node: Node) -> str:
    """Tokens of each row, new ones included, (B, 1)."""
    last = prologue.node("Reshape", prologue.cast(node.inputs[SEQLENS], "int64"), prologue.ints(-1, 1))
    return prologue.node("Add", last, prologue.ints(1))


def _padding(decoder: DecoderGraph, prologue: Prologue, node: Node, window: int) -> str:
    """What hides padding, (B, 1, 1, T) or (1, 1, 1, 1); a run that this cache can't follow stops there.

    A row without padding needs nothing, nor does a first prompt: its padding comes last, where no token sees it. Later,
    padding that the mask shows lies where it was fed, unless the newest token is among it: then the caller moves it to
    the end at each step.
    """
    is_prompt = _is_prompt(prologue)
    whole = prologue.node("Equal", _lengths(prologue, node), prologue.row_total(node.inputs[QUERY]))
    mask_BT = "" if window else summed_mask(decoder, node.inputs[SEQLENS])
    if not mask_BT:
        shown = prologue.require(prologue.node("Or", whole, is_prompt), PADDED_ROWS)
        return prologue.unsqueeze(shown, 1, 2, 3)
    first, last = (prologue.cast(prologue.node("Gather", mask_BT, prologue.ints(i), axis=1), "bool") for i in (0, -1))
    followed = prologue.node("And", first, prologue.node("Or", last, is_prompt))
    shown = prologue.require(prologue.node("Or", prologue.node("And", whole, last), followed), PADDING_MOVED)
    shown_BT = prologue.node("Where", prologue.cast(mask_BT, "bool"), shown, prologue.scalar(LOWEST))
    return prologue.unsqueeze(shown_BT, 1, 2)


def summed_mask(decoder: DecoderGraph, lengths: str) -> str:
    """The (B, T) mask of which `lengths` is the sum over T, minus 1; "" if that can't be proven."""
    node = _behind(decoder, lengths)
    steps = {"Sub": 1.0, "Add": -1.0}
    if node is None or node.op not in steps or decoder.shapes.scalar(node.inputs[1]) != steps[node.op]:
        return ""
    total = _behind(decoder, node.inputs[0])
    if total is None or total.op != "ReduceSum" or decoder.shapes.rank(total.inputs[0]) != 2:
        return ""
    return total.inputs[0] if reduced_axes(decoder, total) in ([1], [-1]) else ""


def _behind(decoder: DecoderGraph, tensor: str) -> Node | None:
    """The node that makes the numbers of a tensor of one number per row."""
    node = decoder.graph.producer(tensor)
    while node is not None and node.op in KEEPS_NUMBERS:
        node = decoder.graph.producer(node.inputs[0])
    return node
