"""One row of one slot as an immutable value: append, seal, free, crop and measure all give a new value or a number.

A row (`backend.RowState`) is sinks, freed tokens, sealed blocks, residual. Sinks fill first; when the residual holds
residual_length + block_tokens tokens, the oldest block_tokens become one block that never changes again (KIVI,
arXiv 2402.02750, section 3). So a row depends on its tokens only, not on how they were split over calls, and
fork, reorder and rollback are copies of references. A side kept at 32 bits moves into dense blocks likewise,
so that no step copies more than the residual.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np

from ...arrays import FloatArray
from ...spec import DENSE_BITS, SdpaAttributes
from ..backend import BlockState, DenseState, QuantizedBlock, RowState
from .schemes import decode_keys, decode_values, seal_keys, seal_values


def empty_row(heads: int, k_head_size: int, v_head_size: int) -> RowState:
    """A row without tokens."""
    nothing = DenseState(np.zeros((heads, 0, k_head_size), np.float32), np.zeros((heads, 0, v_head_size), np.float32))
    return RowState(nothing, 0, (), nothing)


def row_length(row: RowState, block_tokens: int) -> int:
    """Tokens in the row, freed ones among them."""
    return row.sinks.tokens + row.freed + len(row.blocks) * block_tokens + row.residual.tokens


def append(row: RowState, attributes: SdpaAttributes, k_HND: FloatArray, v_HND: FloatArray) -> RowState:
    """The row with the N new tokens at its end, every full block sealed."""
    to_sinks = min(max(attributes.sink_length - row.sinks.tokens, 0), k_HND.shape[1])
    sinks = _joined(row.sinks, k_HND[:, :to_sinks], v_HND[:, :to_sinks])
    residual = _joined(row.residual, k_HND[:, to_sinks:], v_HND[:, to_sinks:])
    size = attributes.block_tokens
    sealed = max(0, (residual.tokens - attributes.residual_length) // size) * size
    blocks = tuple(_seal(attributes, _part(residual, start, start + size)) for start in range(0, sealed, size))
    if sealed:
        residual = _copy(_part(residual, sealed, residual.tokens))
    return RowState(sinks, row.freed, row.blocks + blocks, residual)


def free(row: RowState, attributes: SdpaAttributes) -> RowState:
    """The row without the blocks that the window hides from every query to come."""
    size = attributes.block_tokens
    begin = row.sinks.tokens + row.freed
    seen = row_length(row, size) - attributes.window + 1
    count = min(max(seen - begin, 0) // size, len(row.blocks)) if attributes.window else 0
    return replace(row, freed=row.freed + count * size, blocks=row.blocks[count:]) if count else row


def least_crop(row: RowState, attributes: SdpaAttributes) -> int:
    """The fewest tokens, but for 0, to which the row can be cut: all that the window then shows must be held."""
    return row.sinks.tokens + row.freed + attributes.window - 1 if row.freed else 0


def crop(row: RowState, attributes: SdpaAttributes, length: int) -> RowState:
    """The first `length` tokens; the kept tokens of a cut block are decoded and become the residual."""
    size, past_sinks = attributes.block_tokens, max(length - row.sinks.tokens - row.freed, 0)
    sinks = _copy(_part(row.sinks, 0, length))
    full_blocks, rest = divmod(past_sinks, size)
    if full_blocks < len(row.blocks):
        last = DenseState(*decode(row.blocks[full_blocks], attributes, row.head_sizes[1]))
    else:
        full_blocks = len(row.blocks)
        rest, last = past_sinks - full_blocks * size, row.residual
    freed = row.freed if length else 0
    return RowState(sinks, freed, row.blocks[:full_blocks], _copy(_part(last, 0, rest)))


def decode(block: BlockState, attributes: SdpaAttributes, v_head_size: int) -> tuple[FloatArray, FloatArray]:
    """(keys, values) of a block as the kernel sees them, each (Hkv, block_tokens, D) f32."""
    key, value = block.key, block.value
    if isinstance(key, QuantizedBlock):
        key = decode_keys(attributes, key)
    if isinstance(value, QuantizedBlock):
        value = decode_values(attributes, value, v_head_size)
    return key, value


def quantized_tokens(row: RowState, attributes: SdpaAttributes) -> int:
    """Tokens whose every side that has codes to hold (bits below 32) was sealed in codes; freed ones were."""
    k_dense, v_dense = attributes.k_bits == DENSE_BITS, attributes.v_bits == DENSE_BITS
    sealed = sum(
        (k_dense or isinstance(b.key, QuantizedBlock)) and (v_dense or isinstance(b.value, QuantizedBlock))
        for b in row.blocks
    )
    return row.freed + sealed * attributes.block_tokens


def pieces(row: RowState) -> list[tuple[object, int]]:
    """(what rows may share, its bytes) of each piece of the row."""
    dense: list[tuple[object, int]] = [(end, end.key.nbytes + end.value.nbytes) for end in (row.sinks, row.residual)]
    return dense + [(block, _side_nbytes(block.key) + _side_nbytes(block.value)) for block in row.blocks]


def _seal(attributes: SdpaAttributes, tokens: DenseState) -> BlockState:
    key, value = seal_keys(attributes, tokens.key), seal_values(attributes, tokens.value)
    return BlockState(key or tokens.key.copy(), value or tokens.value.copy())


def _part(tokens: DenseState, start: int, stop: int) -> DenseState:
    return DenseState(tokens.key[:, start:stop], tokens.value[:, start:stop])


def _copy(tokens: DenseState) -> DenseState:
    return DenseState(tokens.key.copy(), tokens.value.copy())


def _joined(old: DenseState, k_HND: FloatArray, v_HND: FloatArray) -> DenseState:
    if not k_HND.shape[1]:
        return old
    return DenseState(np.concatenate((old.key, k_HND), axis=1), np.concatenate((old.value, v_HND), axis=1))


def _side_nbytes(side: QuantizedBlock | FloatArray) -> int:
    if isinstance(side, QuantizedBlock):
        return sum(getattr(side, f.name).nbytes for f in dataclasses.fields(side))
    return side.nbytes
