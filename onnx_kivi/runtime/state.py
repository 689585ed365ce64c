"""Checks that a CacheState is one that appending could have left: what import_state accepts, whoever wrote it."""

from __future__ import annotations

import numpy as np

from ..arrays import FloatArray
from ..errors import CacheError
from ..spec import DENSE_BITS, MAX_SIZE, SdpaAttributes
from .backend import BlockState, CacheState, QuantizedBlock, RowState
from .numpy_backend.quantize import SMALLEST_SCALE, group_count, packed_size
from .numpy_backend.rows import row_length


def check_state(state: CacheState) -> None:
    """Raise CacheError unless lengths, shapes, types and parameters of `state` agree with its attributes."""
    if state.length < 0:
        raise CacheError(f"cache state: expected a length >= 0, got {state.length}")
    if state.slots and state.step is None:
        raise CacheError("cache state: expected the step's attributes, got none")
    numbers = [slot.attributes.slot for slot in state.slots]
    if numbers != sorted(set(numbers)):
        raise CacheError(f"cache state: expected slots in ascending order, each once, got {numbers}")
    if state.length and all(slot.attributes.kind != "self" for slot in state.slots):
        raise CacheError(f"cache state: expected slots that hold the {state.length} tokens, got none")
    batches = {len(slot.rows) for slot in state.slots if slot.rows}
    if len(batches) > 1:
        raise CacheError(f"cache state: expected as many rows in each slot, got {sorted(batches)}")
    for slot in state.slots:
        where = f"cache state, slot {slot.attributes.slot}"
        for row in slot.rows:
            _check_row(where, slot.attributes, row, _sizes(where, slot.rows[0]))
        lengths = {row_length(row, slot.attributes.block_tokens) for row in slot.rows}
        expected = {state.length} if slot.attributes.kind == "self" else lengths
        if len(lengths) > 1 or not lengths <= expected or (expected - {0} and not lengths):
            raise CacheError(f"{where}: expected {state.length} tokens in each row, got {sorted(lengths)}")


def _check_row(where: str, attributes: SdpaAttributes, row: RowState, sizes: tuple[int, int, int]) -> None:
    heads, k_head_size, v_head_size = sizes
    residual, sinks = _rank_3(where, row.residual_key)[1], _rank_3(where, row.sink_key)[1]
    size = attributes.block_tokens
    _check_array(f"{where}, residual", row.residual_value, (heads, residual, v_head_size), np.float32)
    _check_array(f"{where}, residual", row.residual_key, (heads, residual, k_head_size), np.float32)
    _check_array(f"{where}, sinks", row.sink_key, (heads, sinks, k_head_size), np.float32)
    _check_array(f"{where}, sinks", row.sink_value, (heads, sinks, v_head_size), np.float32)
    full = sinks == attributes.sink_length or not (row.blocks or residual)
    if sinks > attributes.sink_length or not full or residual >= attributes.residual_length + size:
        raise CacheError(
            f"{where}: expected {attributes.sink_length} sinks and fewer than {attributes.residual_length + size} "
            f"tokens in the residual, got {sinks} and {residual}"
        )
    for block in row.blocks:
        _check_block(where, attributes, block, heads, k_head_size, v_head_size)


def _check_block(
    where: str, attributes: SdpaAttributes, block: BlockState, heads: int, k_head_size: int, v_head_size: int
) -> None:
    size = attributes.block_tokens
    groups = group_count(v_head_size, attributes.v_group_size)
    _check_side(
        f"{where}, key block",
        block.key,
        attributes.k_bits,
        dense=(heads, size, k_head_size),
        codes=(heads, k_head_size, packed_size(size, attributes.k_bits)),
        params=(heads, k_head_size),
    )
    _check_side(
        f"{where}, value block",
        block.value,
        attributes.v_bits,
        dense=(heads, size, v_head_size),
        codes=(heads, size, packed_size(v_head_size, attributes.v_bits)),
        params=(heads, size, groups),
    )


def _check_side(
    where: str,
    side: QuantizedBlock | FloatArray,
    bits: int,
    *,
    dense: tuple[int, ...],
    codes: tuple[int, ...],
    params: tuple[int, ...],
) -> None:
    if not isinstance(side, QuantizedBlock):
        _check_array(where, side, dense, np.float32)
        return
    if bits == DENSE_BITS:
        raise CacheError(f"{where}: expected f32, as 32 bits say, got codes")
    _check_array(where, side.codes, codes, np.uint8)
    _check_array(where, side.lo, params, np.float16)
    _check_array(where, side.scale, params, np.float16)
    if not (np.isfinite(side.lo).all() and np.isfinite(side.scale).all() and (side.scale >= SMALLEST_SCALE).all()):
        raise CacheError(f"{where}: expected finite parameters and scales of at least {SMALLEST_SCALE}, got others")


def _check_array(where: str, array: object, shape: tuple[int, ...], dtype: type) -> None:
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else repr(type(array))
        raise CacheError(f"{where}: expected {np.dtype(dtype)} {shape}, got {got}")


def _sizes(where: str, row: RowState) -> tuple[int, int, int]:
    """(heads, key head size, value head size) of the first row of a slot, and so of all."""
    heads, _, k_head_size = _rank_3(where, row.residual_key)
    v_head_size = _rank_3(where, row.residual_value)[2]
    if not all(1 <= size <= MAX_SIZE for size in (heads, k_head_size, v_head_size)):
        raise CacheError(
            f"{where}: expected heads and head sizes from 1 to {MAX_SIZE}, got {heads}, {k_head_size} and {v_head_size}"
        )
    return heads, k_head_size, v_head_size


def _rank_3(where: str, array: FloatArray) -> tuple[int, int, int]:
    if not isinstance(array, np.ndarray) or array.ndim != 3:
        got = array.ndim if isinstance(array, np.ndarray) else repr(type(array))
        raise CacheError(f"{where}: expected arrays of 3 dimensions, got {got}")
    heads, tokens, head_size = array.shape
    return heads, tokens, head_size
