"""Checks that a CacheState is one that appending could have left: what import_state accepts, whoever wrote it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..arrays import ByteArray, FloatArray, HalfArray
from ..block_parts import Parts, key_parts, value_parts
from ..errors import CacheError
from ..spec import DENSE_BITS, SELF, SdpaAttributes
from ..spec_schemes import AFFINE, DIGIT_BITS, key_scheme
from ..spec_types import MAX_SIZE
from .backend import BlockState, CacheState, QuantizedBlock, RowState, SlotState
from .numpy_backend.quantize import SMALLEST_SCALE, unpack
from .numpy_backend.rows import row_length


def check_state(state: CacheState) -> None:
    """Raise CacheError unless lengths, shapes, types and parameters of `state` agree with its attributes."""
    if any(length < 0 for length in state.lengths):
        raise CacheError(f"cache state: expected a length >= 0, got {min(state.lengths)}")
    if state.slots and state.step is None:
        raise CacheError("cache state: expected the step's attributes, got none")
    numbers = [slot.attributes.slot for slot in state.slots]
    if numbers != sorted(set(numbers)):
        raise CacheError(f"cache state: expected slots in ascending order, each once, got {numbers}")
    if any(state.lengths) and not any(slot.attributes.kind == SELF and slot.rows for slot in state.slots):
        raise CacheError(f"cache state: expected slots that hold the {state.length} tokens, got none")
    for slot in state.slots:
        _check_slot(f"cache state, slot {slot.attributes.slot}", slot, state.lengths)


def _check_slot(where: str, slot: SlotState, lengths: tuple[int, ...]) -> None:
    if slot.rows and len(slot.rows) != len(lengths):
        raise CacheError(f"{where}: expected as many rows in each slot, {len(lengths)}, got {len(slot.rows)}")
    if any(lengths) and slot.attributes.kind == SELF and not slot.rows:
        raise CacheError(f"{where}: expected {max(lengths)} tokens, got no rows")
    for row, length in zip(slot.rows, lengths, strict=False):
        _check_row(where, slot.attributes, row, _sizes(where, slot.rows[0]))
        held = row_length(row, slot.attributes.block_tokens)
        if slot.attributes.kind == SELF and held != length:
            raise CacheError(f"{where}: expected {length} tokens in the row, got {held}")
        _check_freed(where, slot.attributes, row, held)


def _check_freed(where: str, attributes: SdpaAttributes, row: RowState, held: int) -> None:
    end = row.sinks.tokens + row.freed
    hidden = attributes.evict and end <= held - attributes.window + 1
    if row.freed and (row.freed < 0 or row.freed % attributes.block_tokens or not hidden):
        raise CacheError(
            f"{where}: expected freed tokens in whole blocks that the window of {attributes.window} hides, got "
            f"{row.freed} of {held}"
        )


def _check_row(where: str, attributes: SdpaAttributes, row: RowState, sizes: tuple[int, int, int]) -> None:
    heads, k_head_size, v_head_size = sizes
    residual, sinks = _rank_3(where, row.residual.key)[1], _rank_3(where, row.sinks.key)[1]
    size = attributes.block_tokens
    _check_array(f"{where}, residual", row.residual.value, (heads, residual, v_head_size), np.float32)
    _check_array(f"{where}, residual", row.residual.key, (heads, residual, k_head_size), np.float32)
    _check_array(f"{where}, sinks", row.sinks.key, (heads, sinks, k_head_size), np.float32)
    _check_array(f"{where}, sinks", row.sinks.value, (heads, sinks, v_head_size), np.float32)
    full = sinks == attributes.sink_length or not (row.blocks or residual or row.freed)
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
    digits = key_scheme(attributes.k_scheme).digits(k_head_size)
    _check_side(
        f"{where}, key block",
        block.key,
        attributes.k_bits,
        dense=(heads, size, k_head_size),
        parts=key_parts(attributes, heads, k_head_size),
        count=size,
        least=0 if digits else SMALLEST_SCALE,
    )
    if digits and isinstance(block.key, QuantizedBlock):
        _check_digits(f"{where}, key block", block.key, digits)
    _check_side(
        f"{where}, value block",
        block.value,
        attributes.v_bits,
        dense=(heads, size, v_head_size),
        parts=value_parts(attributes, heads, v_head_size),
        count=v_head_size,
        least=SMALLEST_SCALE if attributes.v_scheme == AFFINE else 0,
    )


def _check_side(
    where: str,
    side: QuantizedBlock | FloatArray,
    bits: int,
    *,
    dense: tuple[int, ...],
    parts: Parts,
    count: int,
    least: float | np.float16,
) -> None:
    if not isinstance(side, QuantizedBlock):
        _check_array(where, side, dense, np.float32)
        return
    if bits == DENSE_BITS:
        raise CacheError(f"{where}: expected f32, as 32 bits say, got codes")
    for array, (kind, shape) in zip(side.arrays, parts.values(), strict=True):
        _check_array(where, array, shape, kind)
    if not (np.isfinite(side.lo).all() and _are_at_least(side.scale, least)):
        raise CacheError(f"{where}: expected finite parameters and scales of at least {float(least)}, got others")
    if _is_written_beyond(side.codes, count * bits) or _is_written_beyond(side.digits, side.lo.shape[-1] * DIGIT_BITS):
        raise CacheError(f"{where}: expected zeros behind the last code of each row, got others")
    if not (side.token.all() and _are_at_least(side.unit, SMALLEST_SCALE)):
        raise CacheError(
            f"{where}: expected token scales from 1 on and a unit of at least {SMALLEST_SCALE}, got others"
        )


def _check_digits(where: str, side: QuantizedBlock, count: int) -> None:
    digits_HD = unpack(side.digits, DIGIT_BITS, side.scale.shape[1])
    has_scale = np.where(digits_HD > 0, side.scale >= SMALLEST_SCALE, side.scale.view(np.uint16) == 0)
    if (digits_HD.sum(axis=1) != count).any() or not has_scale.all():
        raise CacheError(
            f"{where}: expected {count} digits for each head, and scales of channels that have some, got others"
        )


def _are_at_least(halves: HalfArray, least: float | np.float16) -> bool:
    return bool((np.isfinite(halves) & (halves >= least) & ~np.signbit(halves)).all())


def _is_written_beyond(packed: ByteArray, bits: int) -> bool:
    return packed.ndim > 1 and bits % 8 > 0 and bool((packed[..., -1] >> bits % 8).any())


def _check_array(where: str, array: object, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else repr(type(array))
        raise CacheError(f"{where}: expected {np.dtype(dtype)} {shape}, got {got}")


def _sizes(where: str, row: RowState) -> tuple[int, int, int]:
    """(heads, key head size, value head size) of the first row of a slot, and so of all."""
    heads, _, k_head_size = _rank_3(where, row.residual.key)
    v_head_size = _rank_3(where, row.residual.value)[2]
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
