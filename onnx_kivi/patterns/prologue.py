"""Nodes that a family puts in front of the op, written as calls.

A tensor is named after what computes it, so the same computation in two layers is one node; spellings follow the
model's opset (ONNX operator specification). As inputs PAST_LENGTH stands for the most past tokens of any row, shape
(1), and ROW_PAST_LENGTH for those of each, (R): one for each row, or one for all.
"""

from __future__ import annotations

from ..graph import Builder, Graph, HashedNames
from ..spec import ALL_NEW, NEW_LENGTH_INPUT
from .decoder_graph import PAST_LENGTH, ROW_PAST_LENGTH

CONTRIB = "com.microsoft"


class Prologue(Builder):
    """Collects new nodes for one match; every method returns the name of a tensor."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.opset, HashedNames())

    def size(self, tensor: str, axis: int) -> str:
        """The size of an axis, shape (1)."""
        return self.node("Gather", self.node("Shape", tensor), self.ints(axis))

    def total_tokens(self, tensor_BS: str) -> str:
        """Past tokens and the new ones, which lie on axis 1 of a tensor; shape (1)."""
        return self.node("Add", PAST_LENGTH, self.size(tensor_BS, 1))

    def row_past(self) -> str:
        """Past tokens of each row, (R, 1)."""
        return self.node("Reshape", ROW_PAST_LENGTH, self.ints(-1, 1))

    def takes_all(self) -> str:
        """Whether all tokens that a row is given are new, (R, 1)."""
        return self.node("Equal", self.node("Reshape", NEW_LENGTH_INPUT, self.ints(-1, 1)), self.ints(ALL_NEW))

    def row_total(self, tensor_BS: str) -> str:
        """Tokens of each row, its new ones included, of those given on axis 1 of a tensor; (R, 1)."""
        given = self.node("Reshape", NEW_LENGTH_INPUT, self.ints(-1, 1))
        new = self.node("Where", self.takes_all(), self.size(tensor_BS, 1), given)
        return self.node("Add", self.row_past(), new)

    def counted(self, size: str) -> str:
        """0, 1, ... size - 1; `size` has one element."""
        limit = self.node("Reshape", size, self.ints())
        return self.node("Range", self.scalar(0), limit, self.scalar(1))

    def require(self, holds: str, demand: str) -> str:
        """0.0, shape (1), if every element of `holds` is true; if not, the run fails in a node named after `demand`.

        ONNX has no assertion, but onnxruntime refuses to gather beyond the end.
        """
        broken = self.node("ReduceMax", self.cast(self.node("Not", holds), "int64"), keepdims=0)
        index = self.node("Reshape", broken, self.ints(1))
        return self.node("Gather", self.floats(0.0), index, stem=demand)

    def heads_first(self, tensor_BSE: str, heads: int) -> str:
        """(B, S, heads * D) as (B, heads, S, D)."""
        tensor_BSHD = self.node("Reshape", tensor_BSE, self.ints(0, 0, heads, -1))
        return self.node("Transpose", tensor_BSHD, perm=(0, 2, 1, 3))
