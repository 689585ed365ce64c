"""Element types of tensors by name and by ONNX's codes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

ELEMENT_CODES: Mapping[str, int] = {
    "float": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
    "int64": onnx.TensorProto.INT64,
    "bool": onnx.TensorProto.BOOL,
}
BOOL: int = ELEMENT_CODES["bool"]
INTEGERS: frozenset[int] = frozenset({onnx.TensorProto.INT64, onnx.TensorProto.INT32})
FLOATS: Mapping[int, str] = {ELEMENT_CODES[name]: name for name in ("float", "float16", "bfloat16")}


def element_name(info: onnx.ValueInfoProto) -> str:
    """Name of a float input's element type, "" for other types."""
    return FLOATS.get(info.type.tensor_type.elem_type, "")
