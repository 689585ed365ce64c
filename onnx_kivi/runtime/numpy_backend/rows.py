"""One row of one slot as an immutable value: append, seal, crop and measure all give a new value or a number.

A row (`backend.RowState`) is sinks, sealed blocks, residual. Sinks fill first; when the residual holds
residual_length + block_tokens tokens, the oldest block_tokens become one block that never changes again (KIVI,
arXiv 2402.02750, section 3). So a row depends on its tokens only, not on how they were split over calls, and
fork, reorder and rollback are copies of references. A side kept at 32 bits moves into dense blocks likewise,
so that no step copies more than the residual.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from ...arrays import FloatArray
from ...spec import DENSE_BITS, SdpaAttributes
from ..backend import BlockState, QuantizedBlock, RowState
from .quantize import decode_keys, decode_values, quantize_keys, quantize_values


def empty_row(heads: int, k_head_size: int, v_head_size: int) -> RowState:
    """A row without tokens."""
    no_key = np.zeros((heads, 0, k_head_size), np.float32)
    no_value = np.zeros((heads, 0, v_head_size), np.float32)
    return RowState(no_key, no_value, (), no_key, no_value)


def row_length(row: RowState, block_tokens: int) -> int:
    """Tokens in the row."""
    dense: int = row.sink_key.shape[1] + row.residual_key.shape[1]
    return dense + len(row.blocks) * block_tokens


def append(row: RowState, attributes: SdpaAttributes, k_HND: FloatArray, v_HND: FloatArray) -> RowState:
    """The row with the N new tokens at its end, every full block sealed."""
    to_sinks = min(max(attributes.sink_length - row.sink_key.shape[1], 0), k_HND.shape[1])
    sink_key = _joined(row.sink_key, k_HND[:, :to_sinks])
    sink_value = _joined(row.sink_value, v_HND[:, :to_sinks])
    key = _joined(row.residual_key, k_HND[:, to_sinks:])
    value = _joined(row.residual_value, v_HND[:, to_sinks:])
    size = attributes.block_tokens
    sealed = max(0, (key.shape[1] - attributes.residual_length) // size) * size
    blocks = tuple(
        _seal(attributes, key[:, start : start + size], value[:, start : start + size])
        for start in range(0, sealed, size)
    )
    if sealed:
        key, value = key[:, sealed:].copy(), value[:, sealed:].copy()
    return RowState(sink_key, sink_value, row.blocks + blocks, key, value)


def crop(row: RowState, attributes: SdpaAttributes, length: int) -> RowState:
    """The first `length` tokens; the kept tokens of a cut block are decoded and become the residual."""
    sinks, size = row.sink_key.shape[1], attributes.block_tokens
    sink_key, sink_value = row.sink_key[:, :length].copy(), row.sink_value[:, :length].copy()
    full_blocks, rest = divmod(max(length - sinks, 0), size)
    if full_blocks < len(row.blocks):
        key, value = decode(row.blocks[full_blocks], attributes, row.residual_value.shape[2])
    else:
        full_blocks = len(row.blocks)
        rest = max(length - sinks, 0) - full_blocks * size
        key, value = row.residual_key, row.residual_value
    return RowState(sink_key, sink_value, row.blocks[:full_blocks], key[:, :rest].copy(), value[:, :rest].copy())


def decode(block: BlockState, attributes: SdpaAttributes, v_head_size: int) -> tuple[FloatArray, FloatArray]:
    """(keys, values) of a block as the kernel sees them, each (Hkv, block_tokens, D) f32."""
    key, value = block.key, block.value
    if isinstance(key, QuantizedBlock):
        key = decode_keys(key, attributes.k_bits, attributes.block_tokens)
    if isinstance(value, QuantizedBlock):
        value = decode_values(value, attributes.v_bits, v_head_size, attributes.v_group_size)
    return key, value


def quantized_tokens(row: RowState, attributes: SdpaAttributes) -> int:
    """Tokens of the blocks in which every side that has codes to hold (bits below 32) holds codes."""
    k_dense, v_dense = attributes.k_bits == DENSE_BITS, attributes.v_bits == DENSE_BITS
    sealed = sum(
        (k_dense or isinstance(b.key, QuantizedBlock)) and (v_dense or isinstance(b.value, QuantizedBlock))
        for b in row.blocks
    )
    return sealed * attributes.block_tokens


def row_nbytes(row: RowState) -> int:
    """Bytes of all arrays of the row."""
    ends = (row.sink_key, row.sink_value, row.residual_key, row.residual_value)
    return sum(a.nbytes for a in ends) + sum(_side_nbytes(b.key) + _side_nbytes(b.value) for b in row.blocks)


def _seal(attributes: SdpaAttributes, k_HTD: FloatArray, v_HTD: FloatArray) -> BlockState:
    key = None if attributes.k_bits == DENSE_BITS else quantize_keys(k_HTD, attributes.k_bits)
    value = (
        None if attributes.v_bits == DENSE_BITS else quantize_values(v_HTD, attributes.v_bits, attributes.v_group_size)
    )
    return BlockState(key or k_HTD.copy(), value or v_HTD.copy())


def _joined(old_HTD: FloatArray, new_HND: FloatArray) -> FloatArray:
    return np.concatenate((old_HTD, new_HND), axis=1) if new_HND.shape[1] else old_HTD


def _side_nbytes(side: QuantizedBlock | FloatArray) -> int:
    if isinstance(side, QuantizedBlock):
        return sum(getattr(side, f.name).nbytes for f in dataclasses.fields(side))
    return side.nbytes
