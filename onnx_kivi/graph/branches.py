"""The branches of an If as models of their own: one in the place of the If, or what makes some outputs of the other.

Names inside a branch differ from those around it (ONNX IR specification), so that a branch can be spliced in as it is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import onnx
from onnx import helper

from ..errors import UnsupportedModelError
from .build import PREFIX, NewConstant, NewNode, NewPart
from .edit import copied, needed, replace_all
from .elements import BOOL, INTEGERS
from .view import Model, Node, outer_reads, subgraphs

THEN, ELSE = "then_branch", "else_branch"


def branch_of(node: Node, name: str) -> onnx.GraphProto:
    """A branch of an If. Raises UnsupportedModelError if it is missing, or gives another number of tensors."""
    body = node.attr(name)
    if not isinstance(body, onnx.GraphProto) or len(body.output) != len(node.outputs):
        raise UnsupportedModelError(f"{node}: expected {name} to give {len(node.outputs)} tensors; export it again")
    return body


def branch_reads(node: Node, name: str) -> frozenset[str]:
    """The tensors from outside that a branch reads."""
    return frozenset(outer_reads(branch_of(node, name)))


def branch_nodes(model: Model, node: Node, name: str) -> list[onnx.NodeProto]:
    """The nodes of a model in which an If has given way to one of its branches."""
    body = branch_of(node, name)
    passed = [
        helper.make_node("Identity", [inner.name], [outer], name=f"{PREFIX}/{outer}")
        for inner, outer in zip(body.output, node.outputs, strict=True)
        if outer and inner.name != outer
    ]
    nodes = [*model.graph.node]
    return [*nodes[: node.index], *body.node, *passed, *nodes[node.index + 1 :]]


def inlined(model: Model, node: Node, name: str, inputs: Collection[str], outputs: Collection[str]) -> Model:
    """A copy of the model that is one branch of an If only, with these of its inputs and outputs."""
    made, body = _frame(model), branch_of(node, name)
    made.graph.node.extend(branch_nodes(model, node, name))
    made.graph.input.extend(i for i in model.graph.input if i.name in inputs)
    made.graph.output.extend(o for o in model.graph.output if o.name in outputs)
    for source in (model.graph, body):
        made.graph.initializer.extend(source.initializer)
        made.graph.sparse_initializer.extend(source.sparse_initializer)
        made.graph.value_info.extend(source.value_info)
        made.graph.quantization_annotation.extend(source.quantization_annotation)
    return made


def part(model: Model, outputs: Mapping[str, str], instead: Sequence[NewPart] = ()) -> Model:
    """A model of what makes some tensors of a model, under the names that `outputs` gives them.

    instead: makes tensors that the model makes otherwise. The part's other tensors and nodes are named as none in the
    model. Raises UnsupportedModelError for nodes with graphs.
    """
    new = [each.proto() for each in instead if isinstance(each, NewNode)]
    replaced = {name for each in new for name in each.output}
    nodes = [*new, *(each for each in model.graph.node if replaced.isdisjoint(each.output))]
    kept = [nodes[i] for i in needed(nodes, [each.input for each in nodes], [*outputs])]
    if any(True for each in kept for _ in subgraphs(each)):
        raise UnsupportedModelError(f"expected plain nodes to make {', '.join(outputs)}, got some with graphs")
    own = {name for each in kept for name in each.output if name}
    names = {name: outputs.get(name, f"{PREFIX}/part/{name}") for name in own}
    reads = {name for each in kept for name in each.input}
    made = _frame(model)
    made.graph.node.extend(_renamed(each, names, f"{PREFIX}/part/") for each in kept)
    made.graph.input.extend(i for i in model.graph.input if i.name in reads)
    made.graph.output.extend(_called(o, outputs[o.name]) for o in model.graph.output if o.name in outputs)
    constants = [each.proto() for each in instead if isinstance(each, NewConstant)]
    made.graph.initializer.extend(t for t in (*model.graph.initializer, *constants) if t.name in reads)
    return made


def weight_uses(model: Model, nodes: Iterable[onnx.NodeProto]) -> frozenset[tuple[str, str]]:
    """Which operator reads which weight of a model, whatever graph it stands in; sizes and scalars are no weights."""
    places = {*INTEGERS, BOOL}
    weights = {t.name for t in model.graph.initializer if t.data_type not in places and math.prod(t.dims) > 1}
    return frozenset((each.op_type, name) for each in _deep(nodes) for name in each.input if name in weights)


def _deep(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from _deep(graph.node)


def without_outputs(made: Model, names: Collection[str]) -> Model:
    """A copy of a part that makes fewer of its outputs."""
    fewer = copied(made)
    outputs = [o for o in made.graph.output if o.name not in names]
    kept = needed(made.graph.node, [node.input for node in made.graph.node], [o.name for o in outputs])
    replace_all(fewer.graph.node, [made.graph.node[i] for i in kept])
    replace_all(fewer.graph.output, outputs)
    return fewer


def add_part(model: Model, made: Model) -> None:
    """Have a part make tensors that have been inputs of the model, of the same names."""
    outputs = {o.name for o in made.graph.output}
    replace_all(model.graph.node, [*made.graph.node, *model.graph.node])
    replace_all(model.graph.input, [i for i in model.graph.input if i.name not in outputs])
    _add_sources(model, made)


def add_choice(model: Model, made: Model, flag: onnx.ValueInfoProto, outputs: Mapping[str, str]) -> None:
    """Have each output of a part be an input of the same name where a flag is true, else what the part makes.

    outputs: input -> the output that gives what was chosen, and that all read who read the input.
    """
    infos = {info.name: info for info in made.graph.output}
    inner = {name: f"{PREFIX}/made/{name}" for node in made.graph.node for name in node.output if name}
    given = {name: f"{PREFIX}/given/{name}" for name in outputs}
    branches = {
        THEN: ([helper.make_node("Identity", [name], [given[name]]) for name in outputs], given),
        ELSE: ([_renamed(each, inner) for each in made.graph.node], inner),
    }
    graphs = {
        branch: helper.make_graph(nodes, branch, [], [_called(infos[name], names[name]) for name in outputs])
        for branch, (nodes, names) in branches.items()
    }
    choice = helper.make_node("If", [flag.name], [*outputs.values()], name=f"{PREFIX}/choice", **graphs)
    for node in model.graph.node:
        _rename_reads(node, outputs)
    replace_all(model.graph.node, [choice, *model.graph.node])
    model.graph.input.append(flag)
    model.graph.output.extend(_called(infos[name], outer) for name, outer in outputs.items())
    _add_sources(model, made)


def _frame(model: Model) -> Model:
    """All of a model but what its graph holds."""
    made = Model(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        functions=model.functions,
        metadata_props=model.metadata_props,
    )
    made.graph.name = model.graph.name
    return made


def _add_sources(model: Model, made: Model) -> None:
    """The inputs and initializers of a part that the model has not."""
    known = {value.name for value in (*model.graph.input, *model.graph.initializer)}
    model.graph.input.extend(i for i in made.graph.input if i.name not in known)
    model.graph.initializer.extend(t for t in made.graph.initializer if t.name not in known)


def _called(info: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    named = copied(info)
    named.name = name
    return named


def _renamed(node: onnx.NodeProto, names: Mapping[str, str], prefix: str = "") -> onnx.NodeProto:
    """A copy of a node that reads and makes tensors of other names."""
    renamed = copied(node)
    for tensors in (renamed.input, renamed.output):
        for i, name in enumerate(tensors):
            tensors[i] = names.get(name, name)
    if renamed.name:
        renamed.name = prefix + renamed.name
    return renamed


def _rename_reads(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Have a node, its graphs too, read tensors of other names."""
    for i, name in enumerate(node.input):
        node.input[i] = names.get(name, name)
    for graph in subgraphs(node):
        for inner in graph.node:
            _rename_reads(inner, names)
        for output in graph.output:
            output.name = names.get(output.name, output.name)
