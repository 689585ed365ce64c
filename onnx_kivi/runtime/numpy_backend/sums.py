"""Sums and rotations whose order of operations is the same in every backend, because codes depend on them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ...arrays import FloatArray

LANES = 16


def lane_sum(x: FloatArray) -> FloatArray:
    """Sum over the last axis: lane j adds terms j, j + 16, ... in order; then the upper half of the lanes is added
    to the lower one, four times."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])
    lanes = np.add.accumulate(padded.reshape(*x.shape[:-1], -1, LANES), axis=-2)[..., -1, :] + np.float32(0)
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half:]
    total: FloatArray = lanes[..., 0]
    return total


def rotated(x: FloatArray) -> FloatArray:
    """Hadamard matrices of orthonormal rows along the last axis, one for each power of two that adds up to its size,
    the largest first. It is its own inverse."""
    return np.concatenate([_hadamard(x[..., part]) for part in _parts(x.shape[-1])], axis=-1)


def _parts(size: int) -> Iterator[slice]:
    start = 0
    for power in reversed(range(size.bit_length())):
        if size >> power & 1:
            yield slice(start, start + (1 << power))
            start += 1 << power


def _hadamard(x: FloatArray) -> FloatArray:
    size, half = x.shape[-1], 1
    while half < size:
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        x = np.stack((first + second, first - second), axis=-2).reshape(x.shape)
        half *= 2
    product: FloatArray = x * np.float32(size**-0.5)
    return product
