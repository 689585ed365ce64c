"""Nodes that a family puts in front of the op, written as calls.

A tensor is named after what computes it, so the same computation in two layers is one node; spellings follow the
model's opset (ONNX operator specification). PAST_LENGTH as an input stands for KvCacheStep's past length, shape (1).
"""

from __future__ import annotations

import hashlib
from typing import Any

from ..graph import BOOL, Graph
from .caches import PAST_LENGTH
from .site import NewConstant, NewNode, Number

INT64 = 7
AXES_ARE_INPUTS = 13
CONTRIB = "com.microsoft"


class Prologue:
    """Collects new nodes for one site; every method returns the name of a tensor."""

    def __init__(self, graph: Graph) -> None:
        self._axes_are_inputs = graph.opset >= AXES_ARE_INPUTS
        self._found: dict[NewNode | NewConstant, None] = {}

    @property
    def parts(self) -> tuple[NewNode | NewConstant, ...]:
        """What was written, in order."""
        return tuple(self._found)

    def nodes(
        self, op: str, *inputs: str, outputs: int, domain: str = "", stem: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """A node with several outputs, whose names begin with `stem`."""
        given = tuple(sorted(attributes.items()))
        stem = _name(stem or op, (domain, inputs, given))
        names = tuple(f"{stem}.{i}" if outputs > 1 else stem for i in range(outputs))
        self._found[NewNode(op, inputs, names, given, domain)] = None
        return names

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output."""
        (name,) = self.nodes(op, *inputs, outputs=1, domain=domain, **attributes)
        return name

    def constant(self, *values: Number) -> str:
        """A list of int64, or of float32 if the values are floats."""
        return self._constant(values)

    def scalar(self, value: Number) -> str:
        """An int64 or float32 without axes."""
        return self._constant(value)

    def int64(self, tensor: str) -> str:
        """Cast to int64."""
        return self.node("Cast", tensor, to=INT64)

    def bool(self, tensor: str) -> str:
        """Cast to bool."""
        return self.node("Cast", tensor, to=BOOL)

    def size(self, tensor: str, axis: int) -> str:
        """The size of an axis, shape (1)."""
        return self.node("Gather", self.node("Shape", tensor), self.constant(axis))

    def total_tokens(self, tensor_BS: str) -> str:
        """Past tokens and the new ones, which lie on axis 1 of a tensor; shape (1)."""
        return self.node("Add", PAST_LENGTH, self.size(tensor_BS, 1))

    def counted(self, size: str) -> str:
        """0, 1, ... size - 1; `size` has one element."""
        limit = self.node("Reshape", size, self.constant())
        return self.node("Range", self.scalar(0), limit, self.scalar(1))

    def unsqueeze(self, tensor: str, *axes: int) -> str:
        """Insert axes of size 1."""
        if self._axes_are_inputs:
            return self.node("Unsqueeze", tensor, self.constant(*axes))
        return self.node("Unsqueeze", tensor, axes=axes)

    def split(self, tensor: str, axis: int, *sizes: int) -> tuple[str, ...]:
        """Cut an axis into parts of these sizes."""
        if self._axes_are_inputs:
            return self.nodes("Split", tensor, self.constant(*sizes), outputs=len(sizes), axis=axis)
        return self.nodes("Split", tensor, outputs=len(sizes), axis=axis, split=sizes)

    def require(self, holds: str, demand: str) -> str:
        """0.0, shape (1), if every element of `holds` is true; if not, the run fails in a node named after `demand`.

        ONNX has no assertion, but onnxruntime refuses to gather beyond the end.
        """
        broken = self.node("ReduceMax", self.int64(self.node("Not", holds)), keepdims=0)
        index = self.node("Reshape", broken, self.constant(1))
        (zero,) = self.nodes("Gather", self.constant(0.0), index, outputs=1, stem=demand)
        return zero

    def heads_first(self, tensor_BSE: str, heads: int) -> str:
        """(B, S, heads * D) as (B, heads, S, D)."""
        tensor_BSHD = self.node("Reshape", tensor_BSE, self.constant(0, 0, heads, -1))
        return self.node("Transpose", tensor_BSHD, perm=(0, 2, 1, 3))

    def _constant(self, values: Number | tuple[Number, ...]) -> str:
        name = _name("constant", values)
        self._found[NewConstant(name, values)] = None
        return name


def _name(stem: str, parts: object) -> str:
    return f"onnx_kivi/{stem.lower()}.{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}"
