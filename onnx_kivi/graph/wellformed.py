"""Of any model: names are text (protobuf hands out bytes for what is not UTF-8), and arrays have few axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

import onnx

from ..errors import UnsupportedModelError
from .external import tensors
from .view import MAX_RANK, Model, subgraphs


def check_wellformed(model: Model) -> None:
    """Raise UnsupportedModelError unless all names and descriptions are UTF-8, and no array has too many axes."""
    odd = next((text for text in _strings(model) if not isinstance(text, str)), None)
    if odd is not None:
        raise UnsupportedModelError(f"expected names in UTF-8, got {odd!r}: the model is damaged; export it again")
    rank = max((len(shape) for shape in _shapes(model)), default=0)
    if rank > MAX_RANK:
        raise UnsupportedModelError(f"expected arrays of at most {MAX_RANK} dimensions, got one of {rank}")


def _shapes(model: Model) -> Iterator[Sized]:
    """Of inputs, outputs, values and tensors; a node's own result is inferred from these."""
    yield from (tensor.dims for tensor in tensors(model))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        yield value.type.tensor_type.shape.dim


def _strings(model: Model) -> Iterator[str]:
    yield from (opset.domain for opset in model.opset_import)
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from (function.name, function.domain, *function.input, *function.output, *function.attribute)
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[str]:
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    for tensor in (*graph.initializer, *(t for s in graph.sparse_initializer for t in (s.values, s.indices))):
        yield from _of_tensor(tensor)
    for note in graph.quantization_annotation:
        yield note.tensor_name
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        for attribute in node.attribute:
            yield attribute.name
            if attribute.type == onnx.AttributeProto.TENSOR:
                yield from _of_tensor(attribute.t)
        for inner in subgraphs(node):
            yield from _of_graph(inner)


def _of_tensor(tensor: onnx.TensorProto) -> Iterator[str]:
    yield tensor.name
    for described in tensor.external_data:
        yield from (described.key, described.value)
