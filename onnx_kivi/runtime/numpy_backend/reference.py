"""Attention over a quantized cache in plain NumPy: the normative math, and the fallback where nothing is compiled.

Contract, per row: scores of the S new queries over [sinks, sealed blocks, residual] and the N new tokens, as given,
each at its own place (freed tokens leave a gap, which the window hides); times scale, softcap, plus mask, causal and
window, one softmax column for the head's sink logit; softmax literally in float32, finite fill values included; times
the values. Codes are folded, never decoded: with k = lo + s c, q.k = q.lo + (q s).c, and with v = lo + s c,
p.v = p.lo + (p s).c (KIVI, arXiv 2402.02750, quantizes as such). Where a scheme rotates, q is rotated for its keys, and
what its values give is rotated back.
What is not finite: a key that causality or the window hides takes no part, whatever it and its value hold. Of the
others, a query times key that is NaN or beyond float32, of either sign, makes its row NaN; so do NaN or +inf in the
row's mask or sink, and a row of nothing but -inf. `nan_to_zero` makes such rows zeros. (Which infinity, or NaN, a sum
of overflowing products comes to depends on their order, so it is not asked.) NaN and infinities in values end where
the sum of weights times values puts them: 0 times infinity is NaN.

Letters: H key/value heads, G query heads per key/value head, S queries, M = G S, T keys of a tile, n blocks of a
tile, t tokens of a block, D channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...arrays import FloatArray
from ...spec import SdpaAttributes
from ...spec_schemes import AFFINE, key_scheme
from ..backend import BlockState, QuantizedBlock, RowState
from .schemes import key_codes, value_codes
from .sums import rotated

TILE_TOKENS = 1024
QUERY_TILE = 64

TileSide = tuple[QuantizedBlock | FloatArray, ...]
Mask = npt.NDArray[np.bool_] | None


@dataclass(frozen=True, slots=True)
class Tile:
    """Consecutive tokens [start, stop) of one row; a side is quantized blocks, or f32 pieces (H, T, D), in order."""

    start: int
    stop: int
    key: TileSide
    value: TileSide


def attend_row(
    attributes: SdpaAttributes,
    row: RowState,
    past_length: int,
    query_HqSD: FloatArray,
    new_key_HND: FloatArray,
    new_value_HND: FloatArray,
    mask: FloatArray | None,
    head_sink: FloatArray | None,
) -> FloatArray:
    """Output (Hq, S, Dv) of one row that holds past_length tokens.

    mask: (1 or Hq, 1 or S, 1 or T), T = past_length + N. head_sink: (Hq,).
    """
    tiles = list(_tiles(attributes, row, new_key_HND, new_value_HND))
    q_heads, queries, _ = query_HqSD.shape
    heads, _, v_head_size = new_value_HND.shape
    output = np.zeros((q_heads, queries, v_head_size), np.float32)
    if tiles:
        for first in range(0, queries, QUERY_TILE):
            some = slice(first, min(first + QUERY_TILE, queries))
            mask_tile = mask[:, some] if mask is not None and mask.shape[1] > 1 else mask
            query, position = query_HqSD[:, some], past_length + first
            output[:, some] = _attend_queries(
                attributes, tiles, heads, v_head_size, position, query, mask_tile, head_sink
            )
    return output


def _tiles(
    attributes: SdpaAttributes, row: RowState, new_key_HND: FloatArray, new_value_HND: FloatArray
) -> Iterator[Tile]:
    def dense(start: int, key: FloatArray, value: FloatArray) -> Iterator[Tile]:
        for i in range(0, key.shape[1], TILE_TOKENS):
            k, v = key[:, i : i + TILE_TOKENS], value[:, i : i + TILE_TOKENS]
            yield Tile(start + i, start + i + k.shape[1], (k,), (v,))

    yield from dense(0, row.sinks.key, row.sinks.value)
    start, size = row.sinks.tokens + row.freed, attributes.block_tokens
    run: list[BlockState] = []
    for block in row.blocks:
        if run and (len(run) == max(1, TILE_TOKENS // size) or _kind(block) != _kind(run[0])):
            yield _block_tile(start, size, run)
            start, run = start + len(run) * size, []
        run.append(block)
    if run:
        yield _block_tile(start, size, run)
        start += len(run) * size
    if row.residual.tokens:
        new_key_HND = np.concatenate((row.residual.key, new_key_HND), axis=1)
        new_value_HND = np.concatenate((row.residual.value, new_value_HND), axis=1)
    yield from dense(start, new_key_HND, new_value_HND)


def _kind(block: BlockState) -> tuple[type, type]:
    return type(block.key), type(block.value)


def _block_tile(start: int, size: int, run: Sequence[BlockState]) -> Tile:
    key, value = tuple(block.key for block in run), tuple(block.value for block in run)
    return Tile(start, start + len(run) * size, key, value)


def _attend_queries(
    attributes: SdpaAttributes,
    tiles: Sequence[Tile],
    heads: int,
    v_head_size: int,
    position: int,
    query_HqSD: FloatArray,
    mask: FloatArray | None,
    head_sink: FloatArray | None,
) -> FloatArray:
    """Output (Hq, S, Dv) of the queries at positions [position, position + S)."""
    q_heads, queries, k_head_size = query_HqSD.shape
    group = q_heads // heads
    with np.errstate(all="ignore"):
        q_HMD = (query_HqSD * np.float32(attributes.scale)).reshape(heads, group * queries, k_head_size)
        peak_HGS1 = np.full((heads, group, queries, 1), -np.inf, np.float32)
        total_HGS1 = np.zeros((heads, group, queries, 1), np.float32)
        if head_sink is not None:
            peak_HGS1[:] = head_sink.reshape(heads, group, 1, 1)
            total_HGS1 += np.exp(peak_HGS1 - _finite(peak_HGS1))
        mixed_HGSD = np.zeros((heads, group, queries, v_head_size), np.float32)
        for tile in tiles:
            if _hidden(attributes, tile, position, queries):
                continue
            scores_HGST = _scores(attributes, tile.key, q_HMD).reshape(heads, group, queries, -1)
            scores_HGST += scores_HGST * np.float32(0)
            hidden_ST = _hidden_keys(attributes, tile, position, queries)
            _mask_scores(attributes, tile, mask, hidden_ST, scores_HGST)
            new_peak = np.maximum(peak_HGS1, scores_HGST.max(axis=-1, keepdims=True))
            shift = _finite(new_peak)
            p_HGST = np.exp(np.subtract(scores_HGST, shift, out=scores_HGST), out=scores_HGST)
            fade = np.exp(peak_HGS1 - shift)
            total_HGS1 = total_HGS1 * fade + p_HGST.sum(axis=-1, keepdims=True)
            mixed_HGSD *= fade
            p_HMT = p_HGST.reshape(heads, group * queries, -1)
            mixed_HGSD += _mix(attributes, tile.value, v_head_size, p_HMT, hidden_ST).reshape(mixed_HGSD.shape)
            peak_HGS1 = new_peak
        mixed_HGSD /= total_HGS1
        if attributes.nan_to_zero:
            np.copyto(mixed_HGSD, np.float32(0), where=np.isnan(total_HGS1) | (total_HGS1 == 0))
    return mixed_HGSD.reshape(q_heads, queries, v_head_size)


def _finite(peak: FloatArray) -> FloatArray:
    """-inf (nothing to see yet) replaced by 0, so that exp(score - peak) is 0 and not NaN."""
    finite: FloatArray = np.where(np.isneginf(peak), np.float32(0), peak)
    return finite


def _hidden(attributes: SdpaAttributes, tile: Tile, position: int, queries: int) -> bool:
    """Whether causality or the window hides the whole tile from all the queries."""
    last = position + queries - 1
    ahead = (attributes.is_causal or attributes.window) and tile.start > last
    behind = attributes.window and tile.stop - 1 <= position - attributes.window
    return bool(ahead or (behind and tile.start >= attributes.window_sinks))


def _hidden_keys(attributes: SdpaAttributes, tile: Tile, position: int, queries: int) -> npt.NDArray[np.bool_] | None:
    """(S, T): which keys of the tile causality or the window hides; None where it is none of them."""
    if not (attributes.is_causal or attributes.window):
        return None
    places_T = np.arange(tile.start, tile.stop)
    distance_ST = np.arange(position, position + queries)[:, None] - places_T
    hidden_ST = distance_ST < 0
    if attributes.window:
        hidden_ST |= (distance_ST >= attributes.window) & (places_T >= attributes.window_sinks)
    return hidden_ST if hidden_ST.any() else None


def _mask_scores(
    attributes: SdpaAttributes,
    tile: Tile,
    mask: FloatArray | None,
    hidden_ST: Mask,
    scores_HGST: FloatArray,
) -> None:
    """Softcap, additive mask, causality and window, in place, in this order."""
    heads, group, _, _ = scores_HGST.shape
    if attributes.softcap:
        cap = np.float32(attributes.softcap)
        scores_HGST /= cap
        np.tanh(scores_HGST, out=scores_HGST)
        scores_HGST *= cap
    if mask is not None:
        here = mask[:, :, tile.start : tile.stop] if mask.shape[2] > 1 else mask
        by_head = (heads, group) if mask.shape[0] > 1 else (1, 1)
        scores_HGST += here.reshape(*by_head, *here.shape[1:])
    if hidden_ST is not None:
        np.copyto(scores_HGST, np.float32(-np.inf), where=hidden_ST)


def _scores(attributes: SdpaAttributes, key: TileSide, q_HMD: FloatArray) -> FloatArray:
    """q.k: (H, M, T)."""
    blocks, k_HTD = _split(key)
    if k_HTD is not None:
        scores_HMT: FloatArray = np.matmul(q_HMD, k_HTD.swapaxes(1, 2))
        return scores_HMT
    read = [key_codes(attributes, block) for block in blocks]
    if key_scheme(attributes.k_scheme).rotated:
        q_HMD = rotated(q_HMD)
    lo_nHD, scale_nHD = np.stack([r.lo for r in read]), np.stack([r.scale for r in read])
    scores_nHMt: FloatArray = np.matmul(q_HMD * scale_nHD[:, :, None, :], np.stack([r.codes for r in read]))
    scores_nHMt += np.matmul(q_HMD, lo_nHD[..., None])
    tokens = [r.token for r in read if r.token is not None]
    if tokens:
        scores_nHMt *= np.stack(tokens)[:, :, None, :]
    return np.moveaxis(scores_nHMt, 0, 2).reshape(*q_HMD.shape[:2], -1)


def _mix(
    attributes: SdpaAttributes, value: TileSide, v_head_size: int, p_HMT: FloatArray, hidden_ST: Mask
) -> FloatArray:
    """p.v: (H, M, Dv)."""
    blocks, v_HTD = _split(value)
    if v_HTD is not None:
        return _mix_dense(p_HMT, v_HTD, hidden_ST)
    read = [value_codes(attributes, block, v_head_size) for block in blocks]
    lo_HTg = np.concatenate([r.lo for r in read], axis=1)
    scale_HTg = np.concatenate([r.scale for r in read], axis=1)
    codes_HTD = np.concatenate([r.codes for r in read], axis=1)
    size = attributes.v_group_size or v_head_size
    mixed_HMD: FloatArray = np.matmul(p_HMT, lo_HTg)[..., np.arange(v_head_size) // size]
    for g, start in enumerate(range(0, v_head_size, size)):
        channels = slice(start, start + size)
        mixed_HMD[..., channels] += np.matmul(p_HMT * scale_HTg[:, None, :, g], codes_HTD[..., channels])
    return mixed_HMD if attributes.v_scheme == AFFINE else rotated(mixed_HMD)


def _mix_dense(p_HMT: FloatArray, v_HTD: FloatArray, hidden_ST: Mask) -> FloatArray:
    """p.v: (H, M, Dv). A hidden token's weight is 0, but 0 times infinity is NaN: its value is left out."""
    mixed_HMD: FloatArray
    if hidden_ST is None or np.isfinite(v_HTD).all():
        mixed_HMD = np.matmul(p_HMT, v_HTD)
        return mixed_HMD
    is_lost_T = np.logical_not(np.isfinite(v_HTD).all(axis=(0, 2)))
    hidden_MT = np.tile(hidden_ST, (p_HMT.shape[1] // len(hidden_ST), 1))
    mixed_HMD = np.matmul(p_HMT, np.where(is_lost_T[:, None], np.float32(0), v_HTD))
    for t in np.flatnonzero(is_lost_T):
        mixed_HMD += np.where(hidden_MT[:, t, None], np.float32(0), p_HMT[..., t, None] * v_HTD[:, None, t])
    return mixed_HMD


def _split(side: TileSide) -> tuple[list[QuantizedBlock], FloatArray | None]:
    """(quantized blocks, None), or ([], the f32 tokens as one array)."""
    blocks = [piece for piece in side if isinstance(piece, QuantizedBlock)]
    dense = [piece for piece in side if not isinstance(piece, QuantizedBlock)]
    if not dense:
        return blocks, None
    return blocks, dense[0] if len(dense) == 1 else np.concatenate(dense, axis=1)
