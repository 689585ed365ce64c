"""How many bytes a cache of so many tokens holds."""

from __future__ import annotations

import numpy as np

from ..runtime.backend import Backend
from ..spec import COMMITTED_LENGTH, SdpaAttributes

NOTHING = np.zeros(0, np.float32)


class CacheSizes:
    """Bytes of one row by its tokens. token: of one that is not sealed; block: of a sealed one, of all slots.

    attributes: of any slot, as blocks, recent tokens and sinks are the same in all. Exact but for blocks that float16
    can't describe, which stay float32, and for windows: what they free is not counted.
    """

    def __init__(self, token: int, block: int, attributes: SdpaAttributes) -> None:
        self._token, self._block, self._attributes = token, block, attributes

    @classmethod
    def measured(cls, backend: Backend, handle: int) -> CacheSizes:
        """Of the model that a cache of one token is of, which is filled until a block is sealed."""
        state, token = backend.export_state(handle), backend.nbytes(handle)
        attributes = state.slots[0].attributes
        tokens = attributes.sink_length + attributes.residual_length + attributes.block_tokens
        random = np.random.default_rng(0)
        assert state.step is not None
        _, ticket = backend.open_step(handle, COMMITTED_LENGTH, state.step)
        for slot in state.slots:
            row = slot.rows[0]
            key, value = (random.standard_normal((1, row.kv_heads, tokens, n), np.float32) for n in row.head_sizes)
            backend.attend(ticket, slot.attributes, key[:, :, :0], key, value, NOTHING, NOTHING)
        block = backend.nbytes(handle) - token * (1 + tokens - attributes.block_tokens)
        return cls(token, max(block, 0), attributes)

    def whole(self, tokens: int) -> int:
        """All bytes of a row."""
        return self.sealed(tokens) + self.tail(tokens)

    def tail(self, tokens: int) -> int:
        """Bytes of what is not sealed, which copies of different lengths do not share."""
        return self._token * (tokens - self._blocks(tokens) * self._attributes.block_tokens)

    def sealed(self, tokens: int) -> int:
        """Bytes of the sealed blocks."""
        return self._block * self._blocks(tokens)

    def _blocks(self, tokens: int) -> int:
        """How many blocks are sealed."""
        kept = self._attributes.sink_length + self._attributes.residual_length
        return max(0, tokens - kept) // self._attributes.block_tokens
