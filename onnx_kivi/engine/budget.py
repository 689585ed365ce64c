"""How many bytes a cache of so many tokens holds, and whether one more fits."""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.backend import SlotState
from ..spec import DENSE_BITS, SELF, SdpaAttributes

DENSE_BYTES = 4
PARAMETER_BYTES = 4
VECTOR = 16


class CacheSizes:
    """Bytes of one row by its tokens. slots: of any cache of the model that holds a row.

    Exact but for blocks that float16 can't describe, which stay float32. What a window frees is not counted, sizes are
    padded as the native backend pads them: others hold no more.
    """

    def __init__(self, slots: Sequence[SlotState]) -> None:
        self._slots = [(slot.attributes, slot.rows[0].kv_heads, slot.rows[0].head_sizes) for slot in slots]

    def whole(self, tokens: int) -> int:
        """All bytes of a row."""
        return self.sealed(tokens) + self.tail(tokens)

    def tail(self, tokens: int) -> int:
        """Bytes of what is not sealed, which copies of different lengths do not share."""
        return sum(
            heads * sum(sizes) * DENSE_BYTES * (tokens - _sealed_tokens(attributes, tokens))
            for attributes, heads, sizes in self._slots
        )

    def sealed(self, tokens: int) -> int:
        """Bytes of the sealed blocks."""
        return sum(
            heads * _block(attributes, *sizes) * (_sealed_tokens(attributes, tokens) // attributes.block_tokens)
            for attributes, heads, sizes in self._slots
        )


def _sealed_tokens(attributes: SdpaAttributes, tokens: int) -> int:
    residual = attributes.residual_length if attributes.kind == SELF else 0
    past = max(0, tokens - attributes.sink_length - residual)
    return past // attributes.block_tokens * attributes.block_tokens


def _block(attributes: SdpaAttributes, key_size: int, value_size: int) -> int:
    """Bytes of one sealed block of one head."""
    tokens = attributes.block_tokens
    keys = key_size * (_codes(tokens, attributes.k_bits) + PARAMETER_BYTES * (attributes.k_bits < DENSE_BITS))
    groups = -(-value_size // (attributes.v_group_size or value_size))
    parameters = groups * PARAMETER_BYTES * (attributes.v_bits < DENSE_BITS)
    return keys + tokens * (_codes(value_size, attributes.v_bits) + parameters)


def _codes(count: int, bits: int) -> int:
    return -(-count // VECTOR) * VECTOR * bits // 8
