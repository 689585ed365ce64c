"""Our nodes in a model file, held to the spec before any runtime sees them.

Whoever wrote the file, these hold for a model that passes: one KvCacheStep, which takes Session's inputs; `layers`
QuantizedKvSdpa nodes, each with a slot of its own and this step's ticket; with ghost I/O one CacheOpen before the step
and one CacheStamp behind it; all in the main graph; every attribute known, once, of its type and in range. Without that
a host may abort (text that is not UTF-8), take a default for what it can't read, or run and forget. onnx is not needed,
and weights are passed over unread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, TypeVar

from .errors import KiviError, SpecMismatchError, UnsupportedModelError
from .paths import open_regular
from .protobuf import Value, fields, signed, taken
from .spec import (
    DOMAIN,
    GHOST_IO,
    GHOST_OPS,
    HANDLE_INPUT,
    KV_CACHE_STEP,
    KV_CACHE_STEP_V2,
    NEW_LENGTH_INPUT,
    NO_IO,
    OPS,
    PAST_LENGTH_INPUT,
    STEP_OPS,
    GhostAttributes,
    SdpaAttributes,
    StepAttributes,
)

# onnx.proto: the numbers of the fields that matter here.
MODEL_GRAPH, MODEL_FUNCTION = 7, 25
GRAPH_NODE, FUNCTION_NODE, FUNCTION_DOMAIN = 1, 7, 10
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP, NODE_ATTRIBUTE, NODE_DOMAIN = 1, 2, 3, 4, 5, 7
ATTRIBUTE_NAME, ATTRIBUTE_INT, ATTRIBUTE_STRING, ATTRIBUTE_TYPE, ATTRIBUTE_REFERENCE = 1, 3, 4, 20, 21
ATTRIBUTE_GRAPHS = (6, 11)
TYPES = {1: "float", 2: "int", 3: "string", 4: "tensor", 5: "graph", 6: "floats", 7: "ints", 8: "strings"}
DEEPEST = 100

Span = tuple[int, int]
OP_OF = {op.name: op for op in OPS}
Attributes = TypeVar("Attributes", StepAttributes, SdpaAttributes, GhostAttributes)


@dataclass(frozen=True, slots=True)
class OwnNodes:
    """The nodes of a rewritten model, in graph order. past, present: the inputs and outputs that ghost I/O keeps."""

    step: StepAttributes
    slots: tuple[SdpaAttributes, ...]
    past: tuple[str, ...] = ()
    present: tuple[str, ...] = ()

    @property
    def io(self) -> str:
        """What stands in the place of past and present: one of IO_KINDS."""
        return GHOST_IO if self.past else NO_IO


@dataclass(frozen=True, slots=True)
class _Node:
    op: str
    name: str
    inputs: list[str]
    outputs: list[str]
    wire: Mapping[str, int | str]

    def refusal(self, expected: str, got: object) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.op} {self.name!r}: expected {expected}, got {got}; rewrite the original model again"
        )


def read_own_nodes(model: Path | bytes) -> OwnNodes | None:
    """The nodes of ours in a model file, or in its bytes; None if it has none.

    Raises UnsupportedModelError for a file that is missing, no model, or breaks a rule above, SpecMismatchError for
    nodes of another version.
    """
    where = "model" if isinstance(model, bytes) else str(model)
    try:
        with BytesIO(model) if isinstance(model, bytes) else open_regular(model) as file:
            nodes = [*_own(file, file.seek(0, os.SEEK_END))]
        return _checked(nodes) if nodes else None
    except FileNotFoundError:
        raise UnsupportedModelError(f"{where}: expected an ONNX file, got nothing there; check the path") from None
    except OSError as error:
        raise UnsupportedModelError(f"{where}: expected an ONNX file: {error.strerror}") from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"{where}: expected an ONNX model, got a file that is truncated or something else ({error})"
        ) from error
    except KiviError as error:
        raise type(error)(f"{where}: {error}") from error


def _checked(nodes: list[_Node]) -> OwnNodes:
    steps = [node for node in nodes if node.op in STEP_OPS]
    if len(steps) != 1:
        raise nodes[-1].refusal(f"one {KV_CACHE_STEP.name} in the model", len(steps))
    (opening,) = steps
    step = _parsed(StepAttributes, opening)
    ghosts = [node for node in nodes if node.op in GHOST_OPS]
    attending = [node for node in nodes if node not in (opening, *ghosts)]
    if step.layers != len(attending):
        raise opening.refusal(f"layers to be the number of its nodes, {len(attending)}", step.layers)
    past, present = _check_ghosts(ghosts, opening, step) if ghosts else ((), ())
    controls = [tensor.name for tensor in OP_OF[opening.op].inputs]
    if not ghosts and opening.inputs != controls:
        raise opening.refusal(f"inputs {', '.join(controls)}", opening.inputs)
    slots: dict[int, SdpaAttributes] = {}
    for node in attending:
        if opening.outputs[-1:] != node.inputs[-1:]:
            raise node.refusal(f"the ticket of {opening.name!r} as its last input", node.inputs[-1:])
        attributes = _parsed(SdpaAttributes, node)
        if attributes.slot in slots:
            raise node.refusal("a slot of its own", f"slot {attributes.slot}, which another node has")
        slots[attributes.slot] = attributes
    return OwnNodes(step, tuple(slots.values()), past, present)


def _check_ghosts(ghosts: list[_Node], opening: _Node, step: StepAttributes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The past inputs and present outputs of a model with ghost I/O. Raises UnsupportedModelError."""
    if [node.op for node in ghosts] != [*GHOST_OPS]:
        raise ghosts[-1].refusal(f"one {GHOST_OPS[0]}, and one {GHOST_OPS[1]} behind it", [node.op for node in ghosts])
    before, behind = ghosts
    controls = [*before.outputs, NEW_LENGTH_INPUT]
    if opening.op != KV_CACHE_STEP_V2.name or opening.inputs != controls:
        raise opening.refusal(f"to be a {KV_CACHE_STEP_V2.name} with inputs {', '.join(controls)}", opening.inputs)
    carried = before.inputs[2:]
    if before.inputs[:2] != [HANDLE_INPUT, PAST_LENGTH_INPUT]:
        raise before.refusal(f"inputs {HANDLE_INPUT} and {PAST_LENGTH_INPUT} first", before.inputs)
    if behind.inputs != [HANDLE_INPUT, *opening.outputs[-1:], *carried]:
        raise behind.refusal(f"{HANDLE_INPUT}, the ticket of {opening.name!r} and {', '.join(carried)}", behind.inputs)
    for node in ghosts:
        if (of := _parsed(GhostAttributes, node).model_id) != step.model_id:
            raise node.refusal(f"model_id {step.model_id!r}, as {opening.name!r} has", repr(of))
    return tuple(carried[-2:]), tuple(behind.outputs)


def _parsed(kind: type[Attributes], node: _Node) -> Attributes:
    try:
        attributes = kind.from_wire(node.wire)
    except SpecMismatchError as error:
        raise SpecMismatchError(f"{node.op} {node.name!r}: {error}") from error
    except KiviError as error:
        raise UnsupportedModelError(f"{node.op} {node.name!r}: {error}") from error
    if attributes.spec_version != (version := OP_OF[node.op].version):
        raise node.refusal(f"spec_version {version}", attributes.spec_version)
    return attributes


def _own(file: BinaryIO, size: int) -> Iterator[_Node]:
    for number, value in fields(file, 0, size):
        if number == MODEL_GRAPH and isinstance(value, tuple):
            yield from _in_graph(file, value, GRAPH_NODE, 0)
        elif number == MODEL_FUNCTION and isinstance(value, tuple):
            _check_function(file, value)
            yield from _in_graph(file, value, FUNCTION_NODE, 1)


def _check_function(file: BinaryIO, span: Span) -> None:
    for number, value in fields(file, *span):
        if number == FUNCTION_DOMAIN and isinstance(value, tuple) and taken(file, value) == DOMAIN.encode():
            raise UnsupportedModelError(
                f"expected no function in the domain {DOMAIN}, got one; it would hide an operator"
            )


def _in_graph(file: BinaryIO, span: Span, node_number: int, depth: int) -> Iterator[_Node]:
    if depth > DEEPEST:
        raise ValueError("graphs within graphs without end")
    for number, value in fields(file, *span):
        if number == node_number and isinstance(value, tuple):
            content = taken(file, value)
            if DOMAIN.encode() in content:  # else neither it nor any graph in it has a node of ours
                yield from _of_node(BytesIO(content), len(content), depth)


def _of_node(file: BinaryIO, size: int, depth: int) -> Iterator[_Node]:
    found: dict[int, list[Value]] = {}
    for number, value in fields(file, 0, size):
        found.setdefault(number, []).append(value)
    if max(len(found.get(number, [])) for number in (NODE_NAME, NODE_OP, NODE_DOMAIN)) > 1:
        raise ValueError("a node with two names")
    if DOMAIN in _texts(file, found.get(NODE_DOMAIN, [])):
        yield _read(file, found, depth)
    for attribute in found.get(NODE_ATTRIBUTE, []):
        for number, value in fields(file, *attribute) if isinstance(attribute, tuple) else ():
            if number in ATTRIBUTE_GRAPHS and isinstance(value, tuple):
                yield from _in_graph(file, value, GRAPH_NODE, depth + 1)


def _read(file: BinaryIO, found: Mapping[int, list[Value]], depth: int) -> _Node:
    inputs, outputs, names, ops = (
        _texts(file, found.get(number, [])) for number in (NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP)
    )
    wire: dict[str, int | str] = {}
    node = _Node("".join(ops[-1:]), "".join(names[-1:]), inputs, outputs, wire)
    op = OP_OF.get(node.op)
    if op is None:
        raise node.refusal(f"an operator of {DOMAIN}, {' or '.join(OP_OF)}", repr(node.op))
    if depth:
        raise node.refusal("to be in the main graph", "a place in a subgraph or function")
    types = {attribute.name: attribute.wire for attribute in op.attributes}
    for span in found.get(NODE_ATTRIBUTE, []):
        name, value = _attribute(file, node, types, span)
        if name in wire:
            raise node.refusal("each attribute once", f"{name} twice")
        wire[name] = value
    return node


def _attribute(file: BinaryIO, node: _Node, types: Mapping[str, str], span: Value) -> tuple[str, int | str]:
    content = [*fields(file, *span)] if isinstance(span, tuple) else []
    found = dict(content)
    name = "".join(_texts(file, [found.get(ATTRIBUTE_NAME, 0)]))
    number = found.get(ATTRIBUTE_TYPE)
    kind = TYPES.get(number, "another") if isinstance(number, int) else "none"
    if name not in types:
        raise node.refusal(f"attributes {', '.join(types)}", repr(name))
    value = found.get(ATTRIBUTE_INT if types[name] == "int" else ATTRIBUTE_STRING)
    if kind != types[name] or ATTRIBUTE_REFERENCE in found:
        raise node.refusal(f"attribute {name} of type {types[name]}", kind)
    if value is None or isinstance(value, int) != (kind == "int") or len(found) < len(content):
        raise node.refusal(f"one value of attribute {name}", "none, or several")
    if isinstance(value, int):
        return name, signed(value)
    try:
        return name, taken(file, value).decode()
    except UnicodeDecodeError:
        raise node.refusal(f"attribute {name} in UTF-8", repr(taken(file, value))) from None


def _texts(file: BinaryIO, values: list[Value]) -> list[str]:
    """Names; what is not UTF-8 reads as none that we know."""
    return [taken(file, value).decode(errors="replace") for value in values if isinstance(value, tuple)]
