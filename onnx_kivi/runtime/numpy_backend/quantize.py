"""Blocks to codes and back: asymmetric min/max quantization with float16 parameters rounded outward, and bit packing.

Normative for every backend (KIVI, arXiv 2402.02750, section 3: keys per channel, values per token): for a group,
lo = float16 toward -inf of its minimum, scale = float16 toward +inf of (maximum - lo) / (2^bits - 1) and at least
the smallest normal float16, code = clamp(rint((x - lo) / scale), 0, 2^bits - 1), all in float32 with true division
and ties to even. A decoded value is lo + scale * code. A zero lo is +0. A side that holds NaN or infinity, or whose
lo or scale is infinite in float16, is not quantized: it stays dense.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from ...arrays import ByteArray, FloatArray, HalfArray
from ...errors import ConfigError
from ..backend import QuantizedBlock

SMALLEST_SCALE = np.float16(np.finfo(np.float16).smallest_normal)


def quantize_keys(k_HTD: FloatArray, bits: int) -> QuantizedBlock | None:
    """One block of keys (Hkv, block_tokens, Dk), one group per head and channel; None if it must stay dense."""
    block = _quantize(np.ascontiguousarray(k_HTD.swapaxes(1, 2)), bits, k_HTD.shape[1])
    return block and QuantizedBlock(block.codes, block.lo[..., 0], block.scale[..., 0])


def quantize_values(v_HTD: FloatArray, bits: int, group_size: int) -> QuantizedBlock | None:
    """One block of values (Hkv, block_tokens, Dv), one group per head, token and `group_size` channels (0 = all)."""
    return _quantize(v_HTD, bits, group_size or v_HTD.shape[2])


def pack(codes: ByteArray, bits: int) -> ByteArray:
    """Pack codes along the last axis, lowest bits first, each row padded to a whole byte with zeros."""
    if bits == 8:
        return codes
    by_bit = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(by_bit.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack(packed: ByteArray, bits: int, count: int) -> FloatArray:
    """The first `count` codes of each packed row, as f32."""
    if bits == 8:
        return packed.astype(np.float32)
    if 8 % bits:
        by_bit = np.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
        weights = np.float32(2) ** np.arange(bits, dtype=np.float32)
        odd: FloatArray = by_bit.reshape(*packed.shape[:-1], count, bits) @ weights
        return odd
    codes = np.take(_codes_of_byte(bits), packed, axis=0)
    return codes.reshape(*packed.shape[:-1], -1)[..., :count]


def quant_dequant(x: npt.ArrayLike, bits: int, axis: int) -> FloatArray:
    """Quantize to `bits` (1 to 16) and back, with float32 parameters; the bare primitive, for experiments.

    `axis` is the one reduced over: one group (minimum, step) per remaining index. The error is at most half a step,
    (max - min) / (2^bits - 1), of its group, up to the rounding of the result to float32. A group that holds NaN or
    infinity, or whose step float32 can't hold, is returned as it is. Raises ConfigError.
    """
    if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= 16:
        raise ConfigError(f"quant_dequant: bits: expected an integer from 1 to 16, got {bits!r}")
    values = np.asarray(x, dtype=np.float32)
    if not -values.ndim <= axis < values.ndim:
        raise ConfigError(f"quant_dequant: axis: expected one of the {values.ndim} axes of x, got {axis}")
    if values.size == 0:
        return values.copy()
    levels = 2 ** int(bits) - 1
    with np.errstate(over="ignore", invalid="ignore"):
        lo = values.min(axis=axis, keepdims=True).astype(np.float64)
        step = _float32_above((values.max(axis=axis, keepdims=True) - lo) / levels).astype(np.float64)
        codes = np.clip(np.rint((values - lo) / np.where(step > 0, step, 1.0)), 0, levels)
        decoded = np.minimum(lo + step * codes, np.finfo(np.float32).max).astype(np.float32)
    return np.where(np.isfinite(lo + step), decoded, values)


def _quantize(x: FloatArray, bits: int, group_size: int) -> QuantizedBlock | None:
    """Quantize groups of `group_size` along the last axis: codes as packed, lo and scale (..., groups)."""
    *outer, size = x.shape
    group_size = min(group_size, size)
    levels = np.float32(2**bits - 1)
    if padding := -size % group_size:
        x = np.pad(x, [(0, 0)] * len(outer) + [(0, padding)], mode="edge")
    groups = x.reshape(*outer, -1, group_size)
    with np.errstate(over="ignore", invalid="ignore"):
        smallest = groups.min(axis=-1)
        largest = groups.max(axis=-1)
        lo = _float16_below(smallest)
        scale = np.maximum(float16_above((largest - lo.astype(np.float32)) / levels), SMALLEST_SCALE)
    if not (np.isfinite(lo).all() and np.isfinite(scale).all()):
        return None
    steps = groups - lo.astype(np.float32)[..., None]
    steps /= scale.astype(np.float32)[..., None]
    codes = np.clip(np.rint(steps, out=steps), 0, levels, out=steps).astype(np.uint8)
    return QuantizedBlock(pack(codes.reshape(*outer, -1)[..., :size], bits), lo, scale)


def _float16_below(x: FloatArray) -> HalfArray:
    nearest = x.astype(np.float16)
    below: HalfArray = np.where(nearest.astype(np.float32) > x, np.nextafter(nearest, np.float16(-np.inf)), nearest)
    return below + np.float16(0)


def float16_above(x: npt.NDArray[np.floating]) -> HalfArray:
    """float16 toward plus infinity."""
    nearest = x.astype(np.float16)
    return np.where(nearest.astype(np.float32) < x, np.nextafter(nearest, np.float16(np.inf)), nearest)


def _float32_above(x: npt.NDArray[np.float64]) -> FloatArray:
    nearest = x.astype(np.float32)
    above: FloatArray = np.where(nearest < x, np.nextafter(nearest, np.float32(np.inf)), nearest)
    return above


@functools.cache
def _codes_of_byte(bits: int) -> FloatArray:
    """(256, codes per byte): the codes that each byte holds."""
    shifts = np.arange(0, 8, bits)
    codes: npt.NDArray[np.int_] = (np.arange(256)[:, None] >> shifts) & (2**bits - 1)
    return codes.astype(np.float32)
