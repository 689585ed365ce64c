"""Float64 oracle: attention on plain arrays, written out literally, and a decoder of the canonical cache layout.

Shares no code with the package, so that both can't be wrong in the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_kivi.runtime.backend import QuantizedBlock, RowState
from onnx_kivi.spec import SdpaAttributes

Array = npt.NDArray[Any]


def attention(
    attributes: SdpaAttributes, position: int, q: Array, k: Array, v: Array, mask: Array | None, head_sink: Array | None
) -> Array:
    """Output (Hq, S, Dv) of queries (Hq, S, Dk), the first at `position`, over keys (Hkv, T, Dk), values (Hkv, T, Dv).

    A mask value that swallows the score in float32 (the finite fills that exporters write) does so here too.
    """
    queries, tokens = q.shape[1], k.shape[1]
    group = q.shape[0] // k.shape[0]
    k, v = np.repeat(k.astype(np.float64), group, 0), np.repeat(v.astype(np.float64), group, 0)
    with np.errstate(all="ignore"):
        scores = np.einsum("hsd,htd->hst", q.astype(np.float64), k) * attributes.scale
        if attributes.softcap:
            scores = attributes.softcap * np.tanh(scores / attributes.softcap)
        if mask is not None:
            rounded = (scores.astype(np.float32) + mask).astype(np.float64)
            scores = np.where(mask < -1e30, rounded, scores + mask)
        for i in range(queries):
            for j in range(tokens):
                ahead = (attributes.is_causal or attributes.window) and j > position + i
                behind = attributes.window and j <= position + i - attributes.window
                if ahead or behind:
                    scores[:, i, j] = -np.inf
        if head_sink is not None:
            column = np.broadcast_to(head_sink.astype(np.float64)[:, None, None], (q.shape[0], queries, 1))
            scores = np.concatenate((scores, column), axis=-1)
        if scores.shape[-1] == 0:
            return np.zeros((q.shape[0], queries, v.shape[2]))
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        if attributes.nan_to_zero:
            p = np.where(np.isnan(p), 0, p)
        return np.asarray(np.einsum("hst,htd->hsd", p[..., :tokens], v))


def decoded(attributes: SdpaAttributes, row: RowState) -> tuple[Array, Array]:
    """Keys (Hkv, T, Dk) and values (Hkv, T, Dv) that a row stands for, float64; NaN for freed tokens."""
    heads, (k_size, v_size) = row.kv_heads, row.head_sizes
    keys = [row.sinks.key, np.full((heads, row.freed, k_size), np.nan)]
    values = [row.sinks.value, np.full((heads, row.freed, v_size), np.nan)]
    for block in row.blocks:
        keys.append(_keys(attributes, block.key))
        values.append(_values(attributes, block.value, row.sinks.value.shape[2]))
    keys.append(row.residual.key)
    values.append(row.residual.value)
    return np.concatenate(keys, 1).astype(np.float64), np.concatenate(values, 1).astype(np.float64)


def codes(packed: Array, bits: int, count: int) -> Array:
    """The codes of each packed row, lowest bits first."""
    by_bit = np.unpackbits(packed, axis=-1, bitorder="little")[..., : count * bits]
    return np.asarray(by_bit.reshape(*packed.shape[:-1], count, bits) @ (1 << np.arange(bits)))


def _keys(attributes: SdpaAttributes, side: QuantizedBlock | Array) -> Array:
    if not isinstance(side, QuantizedBlock):
        return side
    rows = codes(side.codes, attributes.k_bits, attributes.block_tokens)
    if attributes.k_scheme.startswith("digits"):
        rows = _channels(rows, codes(side.digits, 2, side.lo.shape[1]))
    keys = np.swapaxes(side.lo[..., None].astype(np.float64) + side.scale[..., None].astype(np.float64) * rows, 1, 2)
    if "+token" in attributes.k_scheme:
        keys *= (side.token * side.unit.astype(np.float64)[:, None])[..., None]
    return keys @ hadamard(keys.shape[2]) if "+rotated" in attributes.k_scheme else keys


def _channels(lines: Array, digits: Array) -> Array:
    """Codes of each channel: its digits lie in three runs of lines, those times 1, times 4 and times 16."""
    whole = np.zeros((*digits.shape, lines.shape[2]))
    for head, of_channels in enumerate(digits):
        places = [(e, c) for e in range(3) for c in range(len(of_channels)) if of_channels[c] > e]
        for (e, c), line in zip(places, lines[head], strict=True):
            whole[head, c] += 4**e * line
    return whole


def _values(attributes: SdpaAttributes, side: QuantizedBlock | Array, size: int) -> Array:
    if not isinstance(side, QuantizedBlock):
        return side
    bits, group_size = attributes.v_bits, attributes.v_group_size
    values = codes(side.codes, bits, size).astype(np.float64)
    symmetric = attributes.v_scheme == "symmetric+rotated"
    for channel in range(size):
        group = channel // group_size if group_size else 0
        scale = side.scale[..., group].astype(np.float64)
        lo = -scale * (2**bits - 1) / 2 if symmetric else side.lo[..., group].astype(np.float64)
        values[..., channel] = lo + scale * values[..., channel]
    return values @ hadamard(size) if symmetric else values


def hadamard(size: int) -> Array:
    """A Hadamard matrix over its norm for each power of two in `size`, the largest first, along the diagonal."""
    whole, start = np.zeros((size, size)), 0
    for power in (1 << p for p in range(20, -1, -1)):
        if size & power:
            signs = [[(-1) ** (i & j).bit_count() for j in range(power)] for i in range(power)]
            whole[start : start + power, start : start + power] = np.array(signs) / power**0.5
            start += power
    return whole
