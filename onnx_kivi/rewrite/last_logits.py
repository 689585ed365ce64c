"""The input `num_logits_to_keep`: logits of so many of the last tokens alone, 0 = of all; for models that lack it.

The product with the vocabulary takes each token by itself, and what follows it too. So its operand is cut, which saves
the product and, for a long prompt, logits that are larger than the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UnsupportedModelError
from ..graph import OPEN_END, Builder, Graph, Node, Shape
from ..naming import KEEP_INPUTS
from ..patterns import DecoderGraph

LOGITS = "logits"
KEEP_INPUT = KEEP_INPUTS[0]
KEPT_TOKENS = "logits_kept"
TOKENS_AXIS = 1
HEADS = ("MatMul", "com.microsoft.MatMulNBits")
UNARY = ("Cast", "Identity", "Tanh", "Neg")
BINARY = ("Add", "Div", "Mul", "Sub")


def head_nodes(decoder: DecoderGraph) -> list[Node]:
    """The product with the vocabulary and what follows it, up to the logits; [] if the model has the input already.

    Raises UnsupportedModelError for logits that are not made of each token by itself.
    """
    graph = decoder.graph
    if any(name in graph.inputs for name in KEEP_INPUTS):
        return []
    if KEEP_INPUT in graph.tensor_names:
        raise UnsupportedModelError(f"tensor {KEEP_INPUT!r}: expected no tensor of this name; rename it")
    if not _has_open_axis(graph):
        raise _refusal("an output of this name, (batch, tokens, vocabulary), whose tokens are no fixed number", "none")
    tail: list[Node] = []
    tensor = LOGITS
    while not tail or tail[0].op not in HEADS:
        maker = graph.producer(tensor)
        if maker is None or (tail and not _is_private(graph, tensor)):
            raise _refusal("a product with the vocabulary that nothing else reads", repr(tensor))
        tensor = _operand(decoder, maker)
        tail.insert(0, maker)
    return tail


def emit_last_logits(builder: Builder, tail: Sequence[Node]) -> None:
    """The same nodes behind a cut of what the first of them reads."""
    if not tail:
        return
    first = builder.node("Neg", builder.unsqueeze(KEEP_INPUT, 0))
    ends = builder.ints(OPEN_END)
    operand = builder.node("Slice", tail[0].inputs[0], first, ends, builder.ints(TOKENS_AXIS))
    for node in tail:
        inputs = (operand, *node.inputs[1:]) if node is tail[0] else node.inputs
        builder.copy(node, inputs)


def _has_open_axis(graph: Graph) -> bool:
    for output in graph.model.graph.output:
        if output.name == LOGITS:
            sizes = output.type.tensor_type.shape.dim
            return len(sizes) == 3 and not sizes[TOKENS_AXIS].HasField("dim_value")
    return False


def _is_private(graph: Graph, tensor: str) -> bool:
    return len(graph.consumers(tensor)) == 1 and tensor not in graph.outputs


def _operand(decoder: DecoderGraph, node: Node) -> str:
    """The input of a node that has the tokens. Raises UnsupportedModelError unless it has each of them by itself."""
    own = [name for name in node.inputs if name and not _is_fixed(decoder.graph, name)]
    others = [decoder.shapes.shape(name) for name in node.inputs if name and name not in own]
    if len(own) == 1 and (_is_head(node, own[0], others) or node.op in UNARY or _is_for_all(node, others)):
        return own[0]
    raise _refusal(f"to be made by {', '.join((*HEADS, *UNARY, *BINARY))} of each token by itself", str(node))


def _is_head(node: Node, own: str, others: Sequence[Shape | None]) -> bool:
    """Whether a node is a product of the tokens with one matrix."""
    is_matrix = node.op != "MatMul" or (others[0] is not None and len(others[0]) == 2)
    return node.op in HEADS and own == node.inputs[0] and is_matrix


def _is_for_all(node: Node, others: Sequence[Shape | None]) -> bool:
    """Whether a node adds to each token, or multiplies it with, the same numbers."""
    alike = all(shape is not None and len(shape) <= 3 and {*shape[:-1]} <= {1} for shape in others)
    return node.op in BINARY and alike


def _is_fixed(graph: Graph, tensor: str) -> bool:
    """Whether a tensor follows from weights alone."""
    pending, seen = [tensor], {tensor}
    while pending:
        name = pending.pop()
        node = graph.producer(name)
        if name in graph.inputs:
            return False
        needs = set() if node is None else {*node.inputs, *node.captured} - seen - {""}
        pending += needs
        seen |= needs
    return True


def _refusal(expected: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{LOGITS}: expected {expected}, got {got}; rewrite without --last-logits")
