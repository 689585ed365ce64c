"""A case of the vectors, run on a backend and compared with the float64 oracle.

The bounds: scores carry float32 rounding of a few |q||k| * 2^-24, which the outlier channels of the vectors (offsets
up to 150) raise to some 1e-5; a probability, and so the output of values of size one, is off by as much. The native
kernel may also round queries and probabilities to 16 bits, which costs ten times that.
"""

from __future__ import annotations

import numpy as np

import oracle
import stepping
import vectors
from onnx_kivi.runtime.backend import Backend, QuantizedBlock

BOUNDS = {"numpy": 2e-5, "native": 2e-4}


def compare(backend: Backend, case: vectors.AttendCase) -> None:
    """Fill a cache, run the case on it, and compare every row with the oracle over the decoded cache."""
    node, handle = case.sdpa, backend.new_cache()
    try:
        keys, values = case.cached()
        if case.past:
            query = np.repeat(keys[:, :, :1], case.q_heads // case.kv_heads, axis=1)
            stepping.run(backend, handle, [node], keys, values, query=query)
        rows = backend.export_state(handle).slots[0].rows if case.past else ()
        position, ticket = backend.open_step(handle, -1, stepping.model())
        assert position == case.past
        query, key, value, mask, head_sink = case.inputs()
        output = backend.attend(ticket, node, query, key, value, mask, head_sink)
    finally:
        backend.close(handle)
    assert output.dtype == np.float32
    for b in range(case.batch):
        k, v = key[b].astype(np.float64), value[b].astype(np.float64)
        if rows:
            past_k, past_v = (np.nan_to_num(side) for side in oracle.decoded(node, rows[b]))
            k, v = np.concatenate((past_k, k), 1), np.concatenate((past_v, v), 1)
            sealed = [side for block in rows[b].blocks for side in (block.key, block.value)]
            quantized = any(isinstance(side, QuantizedBlock) for side in sealed) or bool(rows[b].freed)
            assert quantized == (min(node.k_bits, node.v_bits) < 32 or bool(rows[b].freed))
        row_mask = mask[b if mask.shape[0] > 1 else 0] if mask.size else None
        expected = oracle.attention(node, position, query[b], k, v, row_mask, head_sink if head_sink.size else None)
        np.testing.assert_allclose(output[b], expected, rtol=0, atol=BOUNDS[backend.name])
