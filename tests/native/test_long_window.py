"""A long text through a sliding window: exact at 32 bits all the way, in memory that stays the same."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import SdpaAttributes, StepAttributes
from stepping import NOTHING, tokens

pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)

TOKENS, WINDOW, CHUNK, SIZE = 100_000, 4096, 250, 16
NODE = SdpaAttributes(slot=0, k_bits=32, v_bits=32, is_causal=1, window=WINDOW, evict=1, spec_version=2)
MODEL = StepAttributes(model_id="model", layers=1, spec_version=2)
CLOSE = 1e-5  # sums of 4,096 float32 products of order 1, against float64


def expected(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """What the last query (H, D) sees of keys and values (H, T, D) through the window, in float64."""
    scores = np.einsum("hd,htd->ht", query.astype(np.float64), key[:, -WINDOW:])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: np.ndarray = np.einsum("ht,htd->hd", weights / weights.sum(-1, keepdims=True), value[:, -WINDOW:])
    return result


@pytest.mark.slow  # 100,000 tokens take some ten seconds
def test_a_long_text_through_a_window_is_exact_and_takes_no_more_memory() -> None:
    backend, rng = get_backend("native"), np.random.default_rng(0)
    handle = backend.new_cache()
    keys = values = np.zeros((2, 0, SIZE), np.float32)
    sizes = []
    for _ in range(TOKENS // CHUNK):
        query, key, value = (tokens(rng, CHUNK, size=SIZE) * np.float32(0.25) for _ in range(3))
        _, ticket = backend.open_step(handle, -1, MODEL)
        got = backend.attend(ticket, NODE, query, key, value, NOTHING, NOTHING)
        keys, values = (np.concatenate((old, new[0]), 1)[:, -WINDOW:] for old, new in ((keys, key), (values, value)))
        np.testing.assert_allclose(got[0, :, -1], expected(query[0, :, -1], keys, values), rtol=0, atol=CLOSE)
        sizes.append(backend.nbytes(handle))
    assert backend.length(handle) == TOKENS
    assert backend.export_state(handle).slots[0].rows[0].freed > TOKENS - 2 * WINDOW
    settled = sizes[2 * WINDOW // CHUNK :]
    assert max(settled) - min(settled) <= (CHUNK + NODE.block_tokens) * 2 * 2 * SIZE * 4
