"""A model's identity: a hash of its graph and weights that does not depend on where these lie."""

from __future__ import annotations

import hashlib

import onnx

from .external import entry, external_file
from .view import Model

HASHED_BYTES = 4096


def fingerprint(model: Model, *parts: str) -> str:
    """A hash of the graph, its weights and `parts`; weights that lie in other files count by their first bytes."""
    digest = hashlib.sha256(repr(parts).encode())
    graph = model.graph
    for message in (*graph.node, *graph.input, *graph.output, *model.opset_import):
        digest.update(message.SerializeToString(deterministic=True))
    for tensor in graph.initializer:
        digest.update(f"{tensor.name} {tensor.data_type} {list(tensor.dims)}".encode())
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            digest.update(_head(tensor))
        else:
            digest.update(tensor.raw_data or tensor.SerializeToString(deterministic=True))
    return digest.hexdigest()[:32]


def _head(tensor: onnx.TensorProto) -> bytes:
    length = entry(tensor, "length")
    try:
        with external_file(tensor).open("rb") as file:
            file.seek(int(entry(tensor, "offset") or 0))
            return length.encode() + file.read(min(HASHED_BYTES, int(length or HASHED_BYTES)))
    except (OSError, ValueError):
        return length.encode()
