"""One node of a step over its rows: shapes checked, each row attended at its own place, its new tokens appended."""

from __future__ import annotations

import numpy as np

from ...arrays import FloatArray
from ...errors import CacheError
from ...spec import CROSS, QUANTIZED_KV_SDPA, SELF, SdpaAttributes
from ...spec_types import check_shapes
from ..backend import RowState
from .reference import attend_row
from .rows import append, empty_row, row_length
from .steps import Step

TENSORS = tuple(t for t in QUANTIZED_KV_SDPA.inputs if t.element == "float")

Held = tuple[RowState | None, ...]


def attend_node(
    step: Step, attributes: SdpaAttributes, held: Held, inputs: dict[str, FloatArray]
) -> tuple[FloatArray, tuple[RowState, ...]]:
    """(output (B, Hq, S, Dv), the slot's rows with the new tokens). Raises CacheError."""
    where = f"QuantizedKvSdpa, slot {attributes.slot}"
    query, key, value, attn_mask, head_sink = inputs.values()
    given = key.shape[2] if key.ndim == 4 else 0
    if attributes.kind == CROSS and given:
        held = ()
    dims = _dims(where, step, attributes, held, given, inputs)
    rows = tuple(row or empty_row(dims["Hkv"], dims["Dk"], dims["Dv"]) for row in held or (None,) * dims["B"])
    output = np.zeros((*query.shape[:3], dims["Dv"]), np.float32)
    sink = head_sink if head_sink.size else None
    after = []
    for b, row in enumerate(rows):
        queries, new = _new_tokens(where, step, attributes, b, query.shape[2], given)
        k, v = key[b, :, given - new :], value[b, :, given - new :]
        mask = _row_mask(attn_mask, b, queries, row_length(row, attributes.block_tokens) + new)
        first = query.shape[2] - queries
        output[b, :, first:] = attend_row(attributes, row, step.past_of(b), query[b, :, first:], k, v, mask, sink)
        after.append(append(row, attributes, k, v) if new else row)
    return output, tuple(after)


def _dims(
    where: str, step: Step, attributes: SdpaAttributes, held: Held, given: int, inputs: dict[str, FloatArray]
) -> dict[str, int]:
    """Sizes by the spec's letters, once all shapes agree. Raises CacheError."""
    for name, array in inputs.items():
        if array.dtype != np.float32:
            raise CacheError(f"{where}: {name}: expected float32, got {array.dtype}")
    for b in range(step.rows or 1):
        if attributes.kind == SELF and step.past_of(b) and not (held and held[b]):
            raise CacheError(
                f"{where}: expected {step.past_of(b)} tokens, as the step, got an empty slot; use a new cache"
            )
    if attributes.kind == CROSS and not given and inputs["key"].ndim == 4 and not all(held or (None,)):
        raise CacheError(f"{where}: expected an encoder's keys and values in the first run, got none; feed them once")
    dims = {"P": _columns(where, step, attributes, held)}
    first = next((row for row in held if row is not None), None)
    if first is not None:
        dims |= {"Hkv": first.kv_heads, "Dk": first.head_sizes[0], "Dv": first.head_sizes[1]}
    rows = len(held) or step.rows or (len(step.new) if len(step.new) > 1 else 0)
    if rows:
        dims["B"] = rows
    check_shapes(where, TENSORS, {name: array.shape for name, array in inputs.items()}, dims)
    if dims["Hq"] % dims["Hkv"]:
        raise CacheError(
            f"{where}: query: expected a multiple of the {dims['Hkv']} key/value heads, got {dims['Hq']} heads"
        )
    return dims


def _columns(where: str, step: Step, attributes: SdpaAttributes, held: Held) -> int:
    """Columns that a mask has beside those of the tokens a node is given: of the longest row, and padded."""
    if attributes.kind == SELF:
        return max(step.past) + (step.padded or 0 if attributes.slot in step.pending else 0)
    lengths = {row_length(row, attributes.block_tokens) for row in held if row is not None}
    if len(lengths) > 1:
        raise CacheError(f"{where}: expected an encoder's keys of one length in all rows, got {sorted(lengths)}")
    return max(lengths, default=0)


def _new_tokens(
    where: str, step: Step, attributes: SdpaAttributes, row: int, queries: int, given: int
) -> tuple[int, int]:
    """(queries, new tokens) that a row has of those a node is given. Raises CacheError."""
    own, new = step.new_of(row, queries), step.new_of(row, given)
    if own > queries or (given and attributes.kind == SELF and new > given):
        raise CacheError(f"{where}, row {row}: new_length: expected at most {queries}, the tokens given, got {own}")
    return own, new if given and attributes.kind == SELF else given


def _row_mask(mask: FloatArray, row: int, queries: int, tokens: int) -> FloatArray | None:
    """A row's part of the mask, (1 or Hq, 1 or its queries, 1 or its tokens): right-aligned."""
    if not mask.size:
        return None
    own: FloatArray = mask[row if mask.shape[0] > 1 else 0]
    own = own[:, own.shape[1] - queries :] if own.shape[1] > 1 else own
    return own[:, :, own.shape[2] - tokens :] if own.shape[2] > 1 else own
