"""Reading, indexing, understanding and writing ONNX graphs; the only part that imports onnx and onnx_graphsurgeon."""

from .edit import Edit, apply, fingerprint, set_attribute
from .files import load, save
from .schemas import register_schemas
from .symbolic.dims import Dim, substitute, symbol
from .symbolic.einsum import Labels, read_equation
from .symbolic.shapes import Shape, Shapes, Source, infer_shapes
from .text import parse_model
from .view import BOOL, FLOATS, INTEGERS, Graph, Model, Node, element_name

__all__ = [
    "BOOL",
    "FLOATS",
    "INTEGERS",
    "Dim",
    "Edit",
    "Graph",
    "Labels",
    "Model",
    "Node",
    "Shape",
    "Shapes",
    "Source",
    "apply",
    "element_name",
    "fingerprint",
    "infer_shapes",
    "load",
    "parse_model",
    "read_equation",
    "register_schemas",
    "save",
    "set_attribute",
    "substitute",
    "symbol",
]
