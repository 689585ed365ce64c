"""Tensors whose data lies in files beside the model: where it is, and whether it is there and the model's own.

External data counts as the model's only if it lies, links followed, in the model's folder (or, for a model that is a
link itself, in the folder of what it points to, as in a hub's cache of blobs); onnxruntime has the same rule.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx

from ..errors import UnsupportedModelError
from ..paths import open_regular
from .elements import INTEGERS
from .view import Model, elements, subgraphs

BASE = f"basepath.{secrets.token_hex(8)}"  # a file must not be able to name a folder that it was not read from
MOST_DIGITS = 18
SMALL_TENSOR = 1024  # elements: of integers, an axis list or a shape; of others, only a scalar may decide anything


def tensors(model: Model) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a model: initializers and attributes, of the graph, its subgraphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def external_tensors(model: Model) -> Iterator[onnx.TensorProto]:
    """The tensors whose data lies in other files."""
    return (t for t in tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _sparse(graph.sparse_initializer)
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for a in node.attribute:
            if a.type == onnx.AttributeProto.TENSOR:
                yield a.t
            yield from a.tensors
            yield from _sparse([a.sparse_tensor] if a.HasField("sparse_tensor") else a.sparse_tensors)
        for graph in subgraphs(node):
            yield from _graph_tensors(graph)


def _sparse(stored: Iterable[onnx.SparseTensorProto]) -> Iterator[onnx.TensorProto]:
    for tensor in stored:
        yield from (tensor.values, tensor.indices)


def weight_files(model: Model) -> set[Path]:
    """The files that hold the external weights of a model that was loaded."""
    return {external_file(tensor) for tensor in external_tensors(model)}


def entry(tensor: onnx.TensorProto, key: str) -> str:
    """A value of a tensor's external data description, "" if absent."""
    return next((e.value for e in tensor.external_data if e.key == key), "")


def set_entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    """Write a value of a tensor's external data description."""
    drop_entry(tensor, key)
    tensor.external_data.add(key=key, value=value)


def drop_entry(tensor: onnx.TensorProto, key: str) -> None:
    """Remove a value of a tensor's external data description."""
    for i in reversed(range(len(tensor.external_data))):
        if tensor.external_data[i].key == key:
            del tensor.external_data[i]


def external_file(tensor: onnx.TensorProto) -> Path:
    """The file that holds a tensor's data. Raises UnsupportedModelError if the words leave the model's folder."""
    base, location = Path(entry(tensor, BASE) or "."), Path(entry(tensor, "location"))
    if location.is_absolute() or ".." in location.parts or not location.parts or "\0" in str(location):
        raise UnsupportedModelError(
            f"tensor {tensor.name!r}: expected external data in the model's folder, got {str(location)!r}"
        )
    return base / location


def attach(model: Model, file: Path) -> None:
    """Note in each external tensor the folder of the model `file` that it was read from, and bring small ones inline.

    Raises UnsupportedModelError for data that is missing, too short, or not the model's own.
    """
    folder = file.absolute().parent
    own = {Path(os.path.realpath(folder)), Path(os.path.realpath(file)).parent}
    for tensor in external_tensors(model):
        set_entry(tensor, BASE, str(folder))
        offset, length = _extent(tensor)
        source = external_file(tensor)
        _check_held(tensor, source, own, offset + length)
        count = elements(tensor)
        if count is not None and count <= (SMALL_TENSOR if tensor.data_type in INTEGERS else 1):
            tensor.raw_data = read(tensor)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]


def read(tensor: onnx.TensorProto, most: int | None = None) -> bytes:
    """The data of an external tensor, of which `attach` has seen that it is there; at most so many bytes. OSError."""
    offset, length = _extent(tensor)
    with open_regular(external_file(tensor)) as file:
        file.seek(offset)
        sizes = [size for size in (length or None, most) if size is not None]
        return file.read(min(sizes, default=-1))


def _extent(tensor: onnx.TensorProto) -> tuple[int, int]:
    """(offset, length) of a tensor's data; a length of 0 means up to the end of the file."""
    offset, length = (entry(tensor, key) or "0" for key in ("offset", "length"))
    if not (offset.isdecimal() and length.isdecimal()) or max(len(offset), len(length)) > MOST_DIGITS:
        raise UnsupportedModelError(
            f"tensor {tensor.name!r}: expected sizes in its external data, got offset {offset!r}, length {length!r}"
        )
    return int(offset), int(length)


def _check_held(tensor: onnx.TensorProto, source: Path, own: Iterable[Path], end: int) -> None:
    real = Path(os.path.realpath(source))
    if not any(real.is_relative_to(folder) for folder in own):
        raise UnsupportedModelError(
            f"tensor {tensor.name!r}: expected external data in the model's folder, got {source.name}, a link to {real}"
        )
    try:
        with open_regular(source) as file:
            held = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UnsupportedModelError(f"{source}: expected the model's external weights, got no such file") from None
    except OSError as error:
        raise UnsupportedModelError(f"{source}: expected a file of weights: {error.strerror}") from None
    if held < end:
        raise UnsupportedModelError(
            f"{source}: expected at least {end:,} bytes, which tensor {tensor.name!r} needs, got {held:,}: the file is "
            "truncated; export or download it again"
        )
