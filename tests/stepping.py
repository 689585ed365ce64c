"""Drives a backend the way a model does: open a step, run every node with its ticket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_kivi.runtime.backend import Backend, CacheState, QuantizedBlock
from onnx_kivi.spec import SdpaAttributes, StepAttributes

FloatArray = npt.NDArray[np.float32]

NOTHING = np.zeros((0,), np.float32)


def sdpa(slot: int = 0, **options: Any) -> SdpaAttributes:
    """Attributes with small blocks and no residual, so that a few tokens are already quantized."""
    small: dict[str, Any] = {"block_tokens": 4, "residual_length": 0, "sink_length": 1, "v_group_size": 4}
    return SdpaAttributes(slot=slot, **(small | options))


def model(layers: int = 1, model_id: str = "model") -> StepAttributes:
    """Attributes of a model's KvCacheStep."""
    return StepAttributes(model_id=model_id, layers=layers)


def run(
    backend: Backend,
    handle: int,
    nodes: Sequence[SdpaAttributes],
    key: FloatArray,
    value: FloatArray,
    *,
    query: FloatArray | None = None,
    past_length: int = -1,
    model_id: str = "model",
) -> list[FloatArray]:
    """One run of a model whose nodes all get the same tensors; keys (B, Hkv, N, Dk) serve as queries too."""
    _, ticket = backend.open_step(handle, past_length, model(len(nodes), model_id))
    query = key if query is None else query
    return [backend.attend(ticket, node, query, key, value, NOTHING, NOTHING) for node in nodes]


def tokens(rng: np.random.Generator, count: int, *, batch: int = 1, heads: int = 2, size: int = 6) -> FloatArray:
    """Random keys or values (B, Hkv, count, D)."""
    return rng.standard_normal((batch, heads, count, size), dtype=np.float32)


def filled(
    backend: Backend, rng: np.random.Generator, count: int, nodes: Sequence[SdpaAttributes], *, batch: int = 1
) -> int:
    """Handle of a cache with `count` random tokens."""
    handle = backend.new_cache()
    run(backend, handle, nodes, tokens(rng, count, batch=batch), tokens(rng, count, batch=batch))
    return handle


def assert_sealed(backend: Backend, handle: int) -> None:
    """Something is really quantized, in every slot that quantizes."""
    assert backend.sealed_tokens(handle) > 0


def assert_same(a: CacheState, b: CacheState) -> None:
    """Bit for bit the same tokens in the same form, whatever the handles and models."""
    assert (a.lengths, [s.attributes for s in a.slots]) == (b.lengths, [s.attributes for s in b.slots])
    for slot_a, slot_b in zip(a.slots, b.slots, strict=True):
        assert len(slot_a.rows) == len(slot_b.rows)
        for row_a, row_b in zip(slot_a.rows, slot_b.rows, strict=True):
            assert (len(row_a.blocks), row_a.freed) == (len(row_b.blocks), row_b.freed)
            for array_a, array_b in zip(arrays(row_a), arrays(row_b), strict=True):
                assert array_a.dtype == array_b.dtype
                np.testing.assert_array_equal(array_a, array_b)


def arrays(row: Any) -> list[npt.NDArray[Any]]:
    """All arrays of a row, in the canonical order."""
    sides = [side for block in row.blocks for side in (block.key, block.value)]
    sealed = [a for s in sides for a in (s.arrays if isinstance(s, QuantizedBlock) else (s,))]
    return [row.sinks.key, row.sinks.value, *sealed, row.residual.key, row.residual.value]
