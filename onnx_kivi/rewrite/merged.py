"""Merged decoders, both branches of which lie in an If: the one with a past as a plain model, and what that needs.

A first step runs the branch without a past in the original, and the plain model on an empty cache in the rewritten one.
So the branches must be one model: with the same weights in the same operators, but for those that make an encoder's
keys and values, and the one with a past must hide the future where several tokens come at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..graph import (
    ELSE,
    THEN,
    Builder,
    Dim,
    FreeNames,
    Graph,
    Model,
    NewPart,
    Node,
    Shapes,
    add_choice,
    add_part,
    branch_nodes,
    branch_reads,
    element_name,
    fingerprint,
    infer_shapes,
    inlined,
    part,
    set_attribute,
    weight_uses,
    without_outputs,
)
from ..naming import is_cache_name, is_encoder_name, present_of
from ..patterns import Miss, MissError
from ..spec import CROSS, SELF, STEP_OPS, STORED_TOKENS
from .site import Site

PASSED_ON = ("Constant", "Identity")
RANK, TOKENS = 3, 1
MASK = "attention_mask"


@dataclass(frozen=True)
class Encoder:
    """What the branch without a past makes of an encoder's states.

    made: that as a model; it makes the keys and values under the names of the inputs that bring them on. states: its
    input (batch, tokens, width). outputs: each of those inputs -> the output that hands it out.
    """

    made: Model
    states: str
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class Merged:
    """A merged decoder taken apart. node: the If. flag: the input that chooses. plain: the branch with a past."""

    node: str
    flag: Any
    plain: Model
    encoder: Encoder | None


def unmerged(graph: Graph, *, cross: bool) -> Merged | None:
    """The parts of a merged decoder; None for a model that is none. Raises MissError if it can't be taken apart.

    cross: whether the encoder's keys and values are to be stored.
    """
    node = next((each for each in graph.nodes if each.op == "If" and _caches(graph, each.captured)), None)
    if node is None:
        return None
    _check_choice(graph, node)
    outputs = dict(_crossed(graph, node))
    encoder = _encoder(graph, node, outputs) if outputs else None
    _check_weights(graph, node, encoder)
    reads = branch_reads(node, THEN).union(*({*n.inputs, *n.captured} for n in graph.nodes if n is not node))
    if cross and encoder is not None and encoder.states in reads:
        raise MissError(f"the branch with a past reads {encoder.states!r} too, which most steps leave empty")
    kept = [name for name in graph.outputs if name not in outputs.values()]
    plain = inlined(graph.model, node, THEN, graph.inputs.keys() & reads, kept)
    _free_mask(plain)
    return Merged(node.name, graph.inputs[node.inputs[0]], plain, encoder)


def unlike(merged: Merged, sites: Sequence[Site], elsewhere: str) -> Iterator[Miss]:
    """A miss for every site of the plain model that a prompt may need the other branch for. elsewhere: what to do."""
    for site in sites:
        if site.kind == SELF and not site.is_causal:
            yield Miss(
                site.node,
                "its mask is not known to hide later tokens: a prompt needs the branch without a past "
                f"of {merged.node}; {elsewhere or 'export with masks for several tokens'}",
            )


def put_back(merged: Merged, model: Model, sites: Sequence[Site]) -> None:
    """Give a rewritten plain model what makes the encoder's keys and values: to be stored, or to be handed out.

    Those that slots store are made of states with as many tokens as are to be stored. Others are made while the flag
    is false, and handed out, and come back as inputs.
    """
    encoder = merged.encoder
    if encoder is None:
        return
    stored = {name for site in sites if site.kind == CROSS for name in site.cache_inputs}.intersection(encoder.outputs)
    handed = {name: output for name, output in encoder.outputs.items() if name not in stored}
    if stored:
        add_part(model, without_outputs(encoder.made, handed))
        (states,) = (info for info in model.graph.input if info.name == encoder.states)
        states.type.tensor_type.shape.dim[TOKENS].dim_param = STORED_TOKENS
    if handed:
        add_choice(model, without_outputs(encoder.made, stored), merged.flag, handed)
    set_attribute(model, STEP_OPS, "model_id", fingerprint(model))


def _free_mask(plain: Model) -> None:
    """Give the tokens that a mask covers a name of their own.

    optimum.onnx.merge_decoders takes declarations from the branch without a past, whose masks are as long as its ids.
    """
    for info in plain.graph.input:
        if info.name.endswith(MASK) and not is_encoder_name(info.name):
            for axis, size in enumerate(info.type.tensor_type.shape.dim):
                if axis and size.dim_param:
                    size.dim_param = f"{info.name}[{axis}]"


def _caches(graph: Graph, names: frozenset[str]) -> set[str]:
    return {name for name in names if name in graph.inputs and is_cache_name(name) and element_name(graph.inputs[name])}


def _check_choice(graph: Graph, node: Node) -> None:
    """Raise MissError unless an input chooses, and nothing else, and the branch for false has no past."""
    flag = node.input(0)
    if flag not in graph.inputs:
        raise MissError(f"expected an input to choose between the branches, got {flag!r}, which {_maker(graph, flag)}")
    others = [reader for reader in graph.consumers(flag) if reader is not node]
    if others or flag in node.captured or flag in graph.outputs:
        raise MissError(f"{flag!r}, which chooses between the branches, is read elsewhere too")
    if past := _caches(graph, branch_reads(node, ELSE)):
        raise MissError(f"expected a branch for false that has no past, got one that reads {min(past)!r}")


def _maker(graph: Graph, tensor: str) -> str:
    producer = graph.producer(tensor)
    return f"{producer} makes" if producer else "is no input"


def _check_weights(graph: Graph, node: Node, encoder: Encoder | None) -> None:
    """Raise MissError unless both branches read the same weights by the same operators, but for the encoder's."""
    with_past, without = (weight_uses(graph.model, branch_nodes(graph.model, node, name)) for name in (THEN, ELSE))
    made = weight_uses(graph.model, encoder.made.graph.node) if encoder else frozenset()
    if differing := (with_past - without) | (without - with_past - made):
        op, name = min(differing)
        raise MissError(f"only one of the branches has {op} read {name!r}: they are not the same model")


def _crossed(graph: Graph, node: Node) -> Iterator[tuple[str, str]]:
    """Inputs that the branch with a past only reads, and the outputs that hand them out in the other one."""
    outputs = [name for name in node.outputs if name in graph.outputs]
    made = {name: each for each in branch_nodes(graph.model, node, THEN) for name in each.output}
    for name in sorted(_caches(graph, branch_reads(node, THEN))):
        output = present_of(name, outputs)
        maker = made.get(output or "")
        while maker is not None and maker.op_type == "Identity" and maker.input[0] in made:
            maker = made[maker.input[0]]
        if output and maker is not None and _passes_on(graph, maker, name):
            yield name, output


def _passes_on(graph: Graph, maker: Any, name: str) -> bool:
    """Whether a node makes nothing of its own: it passes on an input, or a constant in the place of it."""
    return maker.op_type in PASSED_ON and all(read == name or read in graph.initializers for read in maker.input)


def _encoder(graph: Graph, node: Node, outputs: Mapping[str, str]) -> Encoder:
    """What makes the keys and values. Raises MissError unless they are made of the states alone, token by token."""
    whole = Graph(inlined(graph.model, node, ELSE, graph.inputs, graph.outputs))
    states = _states(whole)
    shapes = infer_shapes(whole)
    sizes = shapes.shape(states) or ()
    made = part(whole.model, {output: name for name, output in outputs.items()}, _sizes_of(whole, shapes, states))
    inputs = [info.name for info in made.graph.input]
    if inputs != [states]:
        raise MissError(f"expected an encoder's keys and values made of {states!r} alone, got {', '.join(inputs)} too")
    if any(sizes[TOKENS] not in (shapes.shape(output) or ()) for output in outputs.values()):
        raise MissError(f"expected keys and values of as many tokens as {states!r} has, got others")
    return Encoder(made, states, outputs)


def _states(graph: Graph) -> str:
    """The input that an encoder gives. Raises MissError unless there is one of three axes that is no cache."""
    floats = {name: info for name, info in graph.inputs.items() if element_name(info) and not is_cache_name(name)}
    found = [name for name, info in floats.items() if len(info.type.tensor_type.shape.dim) == RANK]
    if len(found) != 1:
        raise MissError(f"expected one input (batch, tokens, width) of an encoder, got {', '.join(found) or 'none'}")
    return found[0]


def _sizes_of(graph: Graph, shapes: Shapes, states: str) -> Sequence[NewPart]:
    """The states' own sizes in the place of whatever else shows them, such as the tokens' embeddings."""
    builder = Builder(graph.opset, FreeNames(graph.tensor_names))
    shape = builder.node("Shape", states)
    axes: dict[int | Dim, int] = {s: axis for axis, s in enumerate(shapes.shape(states) or ()) if isinstance(s, Dim)}
    for node in graph.nodes:
        for tensor in node.outputs:
            value = shapes.value(tensor)
            if value is not None and value.size == 1 and value.ndim <= 1 and value.item() in axes:
                axis = axes[value.item()]
                builder.node("Gather", shape, builder.ints(axis) if value.ndim else builder.scalar(axis), output=tensor)
        sizes = shapes.shape(node.outputs[0]) if node.op == "Reshape" else None
        if sizes and {*sizes} <= {*axes, *filter(_is_number, sizes)}:
            _reshape(builder, node, [_size(builder, shape, size, axes) for size in sizes])
    return builder.parts


def _size(builder: Builder, shape: str, size: int | Dim, axes: Mapping[int | Dim, int]) -> str:
    """A size of the states, or a number, as a list of one; that of the tokens, which may be 0, is left to be found."""
    if isinstance(size, int):
        return builder.ints(size)
    return builder.ints(-1) if axes[size] == TOKENS else builder.node("Gather", shape, builder.ints(axes[size]))


def _reshape(builder: Builder, node: Node, sizes: Sequence[str]) -> None:
    """A Reshape to sizes that are known without what the model computes them of."""
    builder.node("Reshape", node.inputs[0], builder.node("Concat", *sizes, axis=0), output=node.outputs[0])


def _is_number(size: int | Dim) -> bool:
    return isinstance(size, int)
