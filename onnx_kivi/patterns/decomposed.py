"""Attention written out as MatMul, scale, mask, Softmax, MatMul over a cache joined by Concat.

The spellings of torch's two exporters, optimum, and onnxruntime's optimizers: scale on scores, query or both sides;
masks by Add or Where; NaN guards; keys transposed in any way; heads repeated by Expand or broadcast by the MatMul;
4-D or ((batch heads), tokens, size) products; softcap; learned sink logits.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..graph import Node, element_name
from .decoder import Decoder, Port, is_float_cast
from .layout import CacheView, cache_view, data_input, factor
from .operands import cache_operand, cache_sizes
from .scores import scores_before
from .site import MissError, Operand, Site
from .softmax import Softmax, check_axis, read_softmax
from .weights import check_reshapes, product_after

FAMILY = "decomposed"
ANCHORS = ("Softmax", "Div")
PORTS: Mapping[str, tuple[Port, ...]] = {}


def match(decoder: Decoder, node: Node) -> Site | None:
    """The site around a softmax that ends in this node; None if it is not over a cache."""
    softmax = read_softmax(decoder, node)
    return None if softmax is None else _match(decoder, softmax)


def _match(decoder: Decoder, softmax: Softmax) -> Site | None:
    scores = scores_before(decoder, softmax.input)
    keys = None if scores is None else cache_view(decoder, scores.matmul.inputs[1])
    if scores is None or keys is None:
        return None
    check_axis(decoder, softmax)
    product = product_after(decoder, softmax.output, scores.sink)
    if product is None:
        raise MissError("the attention weights do not lead to one MatMul with the values of a cache")
    values = cache_view(decoder, product.matmul.inputs[1])
    if values is None:
        raise MissError(f"{product.matmul}: expected the values of a cache, got {product.matmul.inputs[1]!r}")
    if values.scale != 1.0:
        raise MissError(f"{product.matmul}: values multiplied by {values.scale}; expected as they are in the cache")
    rank = len(keys.axes)
    if len(values.axes) != rank:
        raise MissError(f"{product.matmul}: values of {len(values.axes)} axes where keys have {rank}")
    key = cache_operand(keys, scores.matmul, tokens_last=not scores.matmul.attr("transB", 0))
    value = cache_operand(values, product.matmul, tokens_last=bool(product.matmul.attr("transB", 0)))
    query, query_scale = _query(decoder, scores.matmul.inputs[0], scores.matmul)
    kv_heads, k_head_size = cache_sizes(decoder, keys, key)
    v_heads, v_head_size = cache_sizes(decoder, values, value)
    q_heads = _query_heads(decoder, scores.matmul, keys)
    check_reshapes(decoder, (*scores.nodes, *product.nodes), scores.matmul, q_heads)
    if kv_heads != v_heads:
        raise MissError(f"keys have {kv_heads} heads, values {v_heads}; expected the same")
    for matmul in (scores.matmul, product.matmul):
        if matmul.attr("transBatchA", 0) or matmul.attr("transBatchB", 0):
            raise MissError(f"{matmul}: batch axes transposed on the fly; expected a Transpose of its own")
    covered = {n.index for part in (scores, softmax, product) for n in part.nodes}
    return Site(
        layer=-1,
        family=FAMILY,
        node=softmax.name,
        query=query,
        key=key,
        value=value,
        output=Operand(product.matmul.outputs[0], query.layout),
        cache_inputs=(keys.cache.input, values.cache.input),
        cache_outputs=(keys.cache.output, values.cache.output),
        covered=frozenset(covered | keys.covered | values.covered),
        q_heads=q_heads,
        kv_heads=kv_heads,
        k_head_size=k_head_size,
        v_head_size=v_head_size,
        element=element_name(decoder.graph.inputs[keys.cache.input]),
        scale=scores.scale * keys.scale * query_scale,
        mask=scores.mask,
        head_sink=scores.sink,
        softcap=scores.softcap,
        nan_to_zero=product.nan_to_zero,
    )


def _query_heads(decoder: Decoder, matmul: Node, keys: CacheView) -> int:
    """Query heads, proven to be as many as the key heads after repetition (or broadcast from one head)."""
    shape = decoder.shapes.shape(matmul.inputs[0])
    repeated = [a.size for axis in keys.axes[:-2] for a in axis if a.axis != 0]
    heads: object = 1
    for size in repeated:
        heads = size * heads  # type: ignore[operator]
    if not isinstance(heads, int):
        raise MissError(f"{matmul}: the number of key heads it reads is not known")
    if shape is None or len(shape) != len(keys.axes):
        raise MissError(f"{matmul}: expected a query of {len(keys.axes)} axes, as the keys have")
    if len(keys.axes) == 3:
        return heads
    queries = shape[1]
    if not isinstance(queries, int):
        raise MissError(f"{matmul}: the number of query heads is not known")
    if heads not in (queries, 1):
        raise MissError(f"{matmul}: {queries} query heads meet {heads} key heads; expected as many")
    return queries


def _query(decoder: Decoder, tensor: str, matmul: Node) -> tuple[Operand, float]:
    """The query before constant factors, and their product."""
    scale = 1.0
    if matmul.attr("transA", 0):
        raise MissError(f"{matmul}: a transposed query; expected (batch, heads, tokens, size)")
    rank = decoder.shapes.rank(tensor)
    while True:
        node = decoder.graph.producer(tensor)
        if node is None:
            break
        if node.op in ("Mul", "Div"):
            source = data_input(decoder, node)
            if source is None or decoder.shapes.rank(source) != rank:
                break
            scale *= factor(decoder, node, source)
            tensor = source
        elif is_float_cast(decoder.shapes, node):
            tensor = node.inputs[0]
        else:
            break
    if rank not in (3, 4):
        raise MissError(f"{matmul}: expected a query of 3 or 4 axes, got {rank}")
    return Operand(tensor, "BHSD" if rank == 4 else "(BH)SD"), scale
