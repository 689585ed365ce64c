"""ai.onnx TensorScatter into buffers of fixed size, read by Attention that is told how much they hold (opset 24).

The buffers go: our cache holds the tokens that were written. That is the same only while they are written one after
the other from the start, for all rows alike; a run with other write indices or lengths stops.
Source: ONNX operator specification, TensorScatter-24 and Attention-24 (causal masks count from the held length).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...graph import Node, element_name
from ..caches import PAST_LENGTH, CacheTensor, DecoderGraph, Port
from ..prologue import Prologue
from ..site import Added, Filled, MaskTerm, MissError, Operand, Site
from .onnx_attention import NONPAD, SCORES_OUTPUT, attention_mask, attention_scale, query_layout

FAMILY = "tensor_scatter"
ANCHORS = ("Attention",)
PORTS: Mapping[str, tuple[Port, ...]] = {"TensorScatter": (Port(0, 0, 2, new=1, fixed=True),)}

WRITE_INDICES = 2
WRITTEN = "tokens_must_be_written_where_the_cache_ends"
HELD = "rows_must_be_of_one_length"


def match(decoder: DecoderGraph, node: Node) -> Site | None:
    """The site of an Attention node over buffers; None if its keys are no buffer."""
    keys, values = (decoder.caches.get(name) for name in node.inputs[1:3])
    if keys is None or not keys.fixed:
        return None
    if values is None or not values.fixed:
        raise MissError(f"expected values from a buffer as the keys are, got {node.inputs[2]!r}")
    if not node.input(NONPAD):
        raise MissError("no nonpad_kv_seqlen: it sees the whole buffer, whatever it holds")
    if len(node.outputs) > SCORES_OUTPUT and node.outputs[SCORES_OUTPUT]:
        raise MissError("the scores are an output of the node; expected only the attention result")
    if node.attr("left_window_size", -1) >= 0 or node.attr("right_window_size", -1) >= 0:
        raise MissError("a window over a buffer; expected none")
    layout, q_heads = query_layout(decoder, node)
    kv_heads, k_head_size = _sizes(decoder, keys)
    v_heads, v_head_size = _sizes(decoder, values)
    if kv_heads != v_heads or q_heads % kv_heads:
        raise MissError(f"{q_heads} query heads, {kv_heads} key heads, {v_heads} value heads; expected multiples")
    prologue = Prologue(decoder.graph)
    total = prologue.node("Add", PAST_LENGTH, prologue.size(keys.new, 2))
    guard = prologue.require(prologue.node("Equal", node.inputs[NONPAD], total), HELD)
    for name in dict.fromkeys(_write_indices(decoder, cache) for cache in (keys, values)):
        guard = prologue.node("Add", guard, prologue.require(prologue.node("Equal", name, PAST_LENGTH), WRITTEN))
    mask = tuple(_as_long(prologue, term, total) for term in attention_mask(decoder, node))
    return Site(
        layer=-1,
        family=FAMILY,
        node=node.name,
        query=Operand(node.inputs[0], layout),
        key=Operand(keys.new),
        value=Operand(values.new),
        output=Operand(node.outputs[0], layout),
        cache_inputs=(keys.input, values.input),
        cache_outputs=(keys.output, values.output),
        covered=keys.nodes | values.nodes | {node.index},
        q_heads=q_heads,
        kv_heads=kv_heads,
        k_head_size=k_head_size,
        v_head_size=v_head_size,
        element=element_name(decoder.graph.inputs[keys.input]),
        scale=attention_scale(node, k_head_size),
        mask=(*mask, Added(prologue.unsqueeze(guard, 1, 2, 3))),
        softcap=float(node.attr("softcap", 0.0)),
        is_causal=bool(node.attr("is_causal", 0)),
        nan_to_zero=True,
        prologue=prologue.parts,
    )


def _sizes(decoder: DecoderGraph, cache: CacheTensor) -> tuple[int, int | None]:
    shape = decoder.shapes.shape(cache.input)
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        raise MissError(f"buffer {cache.input!r}: expected (batch, heads, tokens, size), its heads declared")
    return shape[1], shape[3] if isinstance(shape[3], int) else None


def _write_indices(decoder: DecoderGraph, cache: CacheTensor) -> str:
    node = decoder.graph.producer(cache.joined)
    if node is None or node.attr("axis", -2) not in (-2, 2) or node.attr("mode", "linear") != "linear":
        raise MissError(f"{node}: expected a linear buffer with its tokens on axis 2")
    if not node.input(WRITE_INDICES):
        raise MissError(f"{node}: no write indices: every step would begin at 0")
    return node.inputs[WRITE_INDICES]


def _as_long(prologue: Prologue, term: MaskTerm, total: str) -> MaskTerm:
    """A mask over the buffer as one over the tokens held."""
    if isinstance(term, Added):
        return replace(term, tensor=_cut(prologue, term.tensor, total))
    assert isinstance(term, Filled)
    return replace(term, condition=_cut(prologue, term.condition, total))


def _cut(prologue: Prologue, mask: str, total: str) -> str:
    return prologue.node("Slice", mask, prologue.constant(0), total, prologue.constant(-1))
