"""Reading, indexing, understanding and writing ONNX graphs; the only part that imports onnx and onnx_graphsurgeon."""

from .branches import (
    ELSE,
    THEN,
    add_choice,
    add_part,
    branch_nodes,
    branch_reads,
    inlined,
    part,
    weight_uses,
    without_outputs,
)
from .build import Builder, FreeNames, HashedNames, Names, NewConstant, NewNode, NewPart, Number
from .edit import Changes, apply, copied, set_attribute
from .elements import BOOL, ELEMENT_CODES, FLOATS, INTEGERS, element_name
from .external import weight_files
from .files import load, save
from .fingerprint import fingerprint
from .rounding import nudged, rounds_activations, unrounded
from .schemas import register_schemas
from .symbolic.dims import Dim, TooComplexError, divide, substitute, symbol
from .symbolic.einsum import Labels, read_equation
from .symbolic.shape_rules import OPEN_END
from .symbolic.shapes import Shape, Shapes, Source, infer_shapes
from .text import parse_model
from .view import Graph, Model, Node
from .wellformed import check_wellformed

__all__ = [
    "BOOL",
    "ELEMENT_CODES",
    "ELSE",
    "FLOATS",
    "INTEGERS",
    "OPEN_END",
    "THEN",
    "Builder",
    "Changes",
    "Dim",
    "FreeNames",
    "Graph",
    "HashedNames",
    "Labels",
    "Model",
    "Names",
    "NewConstant",
    "NewNode",
    "NewPart",
    "Node",
    "Number",
    "Shape",
    "Shapes",
    "Source",
    "TooComplexError",
    "add_choice",
    "add_part",
    "apply",
    "branch_nodes",
    "branch_reads",
    "check_wellformed",
    "copied",
    "divide",
    "element_name",
    "fingerprint",
    "infer_shapes",
    "inlined",
    "load",
    "nudged",
    "parse_model",
    "part",
    "read_equation",
    "register_schemas",
    "rounds_activations",
    "save",
    "set_attribute",
    "substitute",
    "symbol",
    "unrounded",
    "weight_files",
    "weight_uses",
    "without_outputs",
]
