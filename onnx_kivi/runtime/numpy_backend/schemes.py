"""Sealing and reading a side of a block by its scheme. `quantize` has what all schemes share.

Normative for every backend; SPEC.md, "Schemes", says the same in words. Sources: KIVI (arXiv 2402.02750) for parameters
per key channel and per value token; QuaRot (arXiv 2404.00456) for rotations of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...arrays import ByteArray, FloatArray, HalfArray, IntArray
from ...spec import DENSE_BITS, SdpaAttributes
from ...spec_schemes import AFFINE, DIGIT_BITS, FACTORS, MOST_DIGITS, STARTS, TOKEN_SCALES, key_scheme
from ..backend import NO_HALVES, QuantizedBlock
from .quantize import SMALLEST_SCALE, float16_above, pack, quantize_keys, quantize_values, unpack
from .sums import lane_sum, rotated


@dataclass(frozen=True, slots=True)
class KeyCodes:
    """Keys as the kernel reads them: token * (lo + scale * code), in the rotated space where the scheme rotates.

    codes: (Hkv, Dk, block_tokens). lo, scale: (Hkv, Dk). token: (Hkv, block_tokens), or None.
    """

    codes: FloatArray
    lo: FloatArray
    scale: FloatArray
    token: FloatArray | None

    def tokens(self) -> FloatArray:
        """(Hkv, block_tokens, Dk)."""
        k_HTD = (self.lo[..., None] + self.scale[..., None] * self.codes).swapaxes(1, 2)
        return np.ascontiguousarray(k_HTD if self.token is None else k_HTD * self.token[..., None])


@dataclass(frozen=True, slots=True)
class ValueCodes:
    """Values as the kernel reads them: lo + scale * code, in the rotated space where the scheme rotates.

    codes: (Hkv, block_tokens, Dv). lo, scale: (Hkv, block_tokens, groups).
    """

    codes: FloatArray
    lo: FloatArray
    scale: FloatArray


def seal_keys(attributes: SdpaAttributes, k_HTD: FloatArray) -> QuantizedBlock | None:
    """One block of keys (Hkv, block_tokens, Dk) in codes; None if it must stay dense."""
    if attributes.k_bits == DENSE_BITS:
        return None
    scheme = key_scheme(attributes.k_scheme)
    token, unit, given = None, NO_HALVES, k_HTD
    with np.errstate(over="ignore", invalid="ignore"):
        if scheme.rotated:
            given = rotated(given)
        if scheme.token:
            token, unit = _token_scales(given)
            if not np.isfinite(unit).all():
                return None
            given = given / _scales_of(token, unit)[..., None]
        count = scheme.digits(k_HTD.shape[2])
        block = _seal_digits(given, count) if count else quantize_keys(given, attributes.k_bits)
    return block if block is None or token is None else replace(block, token=token, unit=unit)


def seal_values(attributes: SdpaAttributes, v_HTD: FloatArray) -> QuantizedBlock | None:
    """One block of values (Hkv, block_tokens, Dv) in codes; None if it must stay dense."""
    if attributes.v_bits == DENSE_BITS:
        return None
    if attributes.v_scheme == AFFINE:
        return quantize_values(v_HTD, attributes.v_bits, attributes.v_group_size)
    with np.errstate(over="ignore", invalid="ignore"):
        return _seal_symmetric(rotated(v_HTD), attributes.v_bits, attributes.v_group_size or v_HTD.shape[2])


def key_codes(attributes: SdpaAttributes, block: QuantizedBlock) -> KeyCodes:
    """What the kernel reads of a sealed block of keys."""
    lo, scale = block.lo.astype(np.float32), block.scale.astype(np.float32)
    codes = unpack(block.codes, attributes.k_bits, attributes.block_tokens)
    if block.digits.size:
        codes = _joined_digits(codes, unpack(block.digits, DIGIT_BITS, lo.shape[1]))
    return KeyCodes(codes, lo, scale, _scales_of(block.token, block.unit) if block.token.size else None)


def value_codes(attributes: SdpaAttributes, block: QuantizedBlock, v_head_size: int) -> ValueCodes:
    """What the kernel reads of a sealed block of values."""
    codes, scale = unpack(block.codes, attributes.v_bits, v_head_size), block.scale.astype(np.float32)
    lo = block.lo.astype(np.float32) if attributes.v_scheme == AFFINE else scale * -_centre(attributes.v_bits)
    return ValueCodes(codes, lo, scale)


def decode_keys(attributes: SdpaAttributes, block: QuantizedBlock) -> FloatArray:
    """The block's keys (Hkv, block_tokens, Dk) f32, as they were given, but for the error."""
    k_HTD = key_codes(attributes, block).tokens()
    return rotated(k_HTD) if key_scheme(attributes.k_scheme).rotated else k_HTD


def decode_values(attributes: SdpaAttributes, block: QuantizedBlock, v_head_size: int) -> FloatArray:
    """The block's values (Hkv, block_tokens, Dv) f32, as they were given, but for the error."""
    read = value_codes(attributes, block, v_head_size)
    group_of_D = np.arange(v_head_size) // (attributes.v_group_size or v_head_size)
    v_HTD: FloatArray = read.lo[..., group_of_D] + read.scale[..., group_of_D] * read.codes
    return v_HTD if attributes.v_scheme == AFFINE else rotated(v_HTD)


def _token_scales(k_HTD: FloatArray) -> tuple[ByteArray, HalfArray]:
    """Each token's root mean square in units of its block: u8 (Hkv, block_tokens), float16 (Hkv)."""
    least, most = TOKEN_SCALES
    rms_HT = np.sqrt(lane_sum(k_HTD * k_HTD) / np.float32(k_HTD.shape[2]))
    unit_H = np.maximum(float16_above(rms_HT.max(axis=1) / np.float32(most)), SMALLEST_SCALE)
    scaled = np.clip(np.rint(rms_HT / unit_H.astype(np.float32)[:, None]), least, most)
    return np.nan_to_num(scaled).astype(np.uint8), unit_H


def _scales_of(token_HT: ByteArray, unit_H: HalfArray) -> FloatArray:
    scales: FloatArray = token_HT.astype(np.float32) * unit_H.astype(np.float32)[:, None]
    return scales


def _seal_digits(k_HTD: FloatArray, count: int) -> QuantizedBlock | None:
    """Spend `count` digits of two bits on each head, where they lower the squared error most."""
    heads, tokens, size = k_HTD.shape
    if not np.isfinite(k_HTD).all():
        return None
    levels = [quantize_keys(k_HTD, DIGIT_BITS * digits) for digits in range(1, MOST_DIGITS + 1)]
    quantized = [level for level in levels if level is not None]
    if len(quantized) < MOST_DIGITS:
        return None
    x_HDT = np.ascontiguousarray(k_HTD.swapaxes(1, 2))
    mean_HD = (lane_sum(x_HDT) / np.float32(tokens)).astype(np.float16) + np.float16(0)
    codes = [unpack(level.codes, 2 * digits, tokens) for digits, level in enumerate(quantized, 1)]
    lo = np.stack([mean_HD, *(level.lo for level in quantized)])
    scale = np.stack([np.zeros_like(mean_HD), *(level.scale for level in quantized)])
    errors = [_squared_error(x_HDT, *level) for level in zip(lo, scale, [np.zeros_like(x_HDT), *codes], strict=True)]
    digits_HD = _chosen(np.stack(errors), count)
    pick = digits_HD, *np.ogrid[:heads, :size]
    all_codes = np.stack([np.zeros_like(codes[0]), *codes]).astype(np.uint8)
    lines = _digit_lines(all_codes[pick], digits_HD, count)
    return QuantizedBlock(pack(lines, DIGIT_BITS), lo[pick], scale[pick], pack(digits_HD.astype(np.uint8), DIGIT_BITS))


def _squared_error(x_HDT: FloatArray, lo_HD: HalfArray, scale_HD: HalfArray, codes: FloatArray) -> FloatArray:
    error = x_HDT - (lo_HD.astype(np.float32)[..., None] + scale_HD.astype(np.float32)[..., None] * codes)
    return lane_sum(error * error)


def _chosen(errors: FloatArray, count: int) -> IntArray:
    """Digits of each channel (Hkv, Dk), from its error at 0 to 3 of them: the `count` largest gains, each at most the
    gain of the digit before; of equal ones the lower digit, then the lower channel."""
    gains_iHD = np.minimum.accumulate(errors[:-1] - errors[1:], axis=0)
    steps, heads, size = gains_iHD.shape
    best = np.argsort(-gains_iHD.swapaxes(0, 1).reshape(heads, -1), axis=1, kind="stable")[:, :count]
    taken = np.zeros((heads, steps * size), np.intp)
    np.put_along_axis(taken, best, 1, axis=1)
    digits_HD: IntArray = taken.reshape(heads, steps, size).sum(axis=1)
    return digits_HD


def _digit_lines(codes_HDT: ByteArray, digits_HD: IntArray, count: int) -> ByteArray:
    """(Hkv, count, block_tokens): the lowest digits of all channels that have one, then the second ones, the third."""
    heads, _, tokens = codes_HDT.shape
    lines = [
        (codes >> DIGIT_BITS * e & 3)[digits > e]
        for codes, digits in zip(codes_HDT, digits_HD, strict=True)
        for e in range(MOST_DIGITS)
    ]
    return np.concatenate(lines).reshape(heads, count, tokens)


def _joined_digits(lines: FloatArray, digits_HD: FloatArray) -> FloatArray:
    """The codes (Hkv, Dk, block_tokens) that the lines of `_digit_lines` hold."""
    codes = np.zeros((*digits_HD.shape, lines.shape[2]), np.float32)
    for of_head, digits, to in zip(lines, digits_HD, codes, strict=True):
        first = 0
        for e in range(MOST_DIGITS):
            has = np.flatnonzero(digits > e)
            to[has] += np.float32(4**e) * of_head[first : first + len(has)]
            first += len(has)
    return codes


def _seal_symmetric(v_HTD: FloatArray, bits: int, group_size: int) -> QuantizedBlock | None:
    """Codes around zero, with the scale that fits each group best."""
    size = v_HTD.shape[2]
    parts = [_fitted(v_HTD[..., first : first + group_size], bits) for first in range(0, size, group_size)]
    scale_HTg = np.stack([scale for _, scale in parts], axis=-1)
    if not (np.isfinite(v_HTD).all() and np.isfinite(scale_HTg).all()):
        return None
    return QuantizedBlock(pack(np.concatenate([codes for codes, _ in parts], axis=-1), bits), NO_HALVES, scale_HTg)


def _fitted(x: FloatArray, bits: int) -> tuple[ByteArray, HalfArray]:
    """Codes of groups (..., n), and their scales (...): of some scales the one whose codes, scaled anew by least
    squares, come closest."""
    rms = np.sqrt(lane_sum(x * x) / np.float32(x.shape[-1]))
    best, scale = np.full(rms.shape, -1, np.float32), np.zeros(rms.shape, np.float32)
    for factor in FACTORS:
        steps = 2 * _centred(x, rms * np.float32(factor * STARTS[bits]), bits) - 2 * _centre(bits)
        along, square = lane_sum(x * steps), lane_sum(steps * steps)
        gain = along * along / square
        better = gain > best
        best, scale = np.where(better, gain, best), np.where(better, 2 * np.maximum(along, 0) / square, scale)
    fitted = np.where(np.isfinite(rms), scale, np.float32(np.inf)).astype(np.float16)
    return np.nan_to_num(_centred(x, fitted.astype(np.float32), bits)).astype(np.uint8), fitted


def _centre(bits: int) -> np.float32:
    return np.float32((2**bits - 1) / 2)


def _centred(x: FloatArray, scale: FloatArray, bits: int) -> FloatArray:
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    codes: FloatArray = np.clip(np.rint(x * inverse[..., None] + _centre(bits)), 0, 2**bits - 1)
    return codes
