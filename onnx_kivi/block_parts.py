"""The arrays that a side of a sealed block consists of, by its scheme: what files, states and backends exchange."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .spec import SdpaAttributes
from .spec_schemes import AFFINE, DIGIT_BITS, group_count, key_scheme, packed_size

Parts = dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]
"""Type and shape of each part of a `QuantizedBlock`, in its order; (0,) where the scheme has it not."""

ABSENT = (0,)


def key_parts(attributes: SdpaAttributes, heads: int, size: int) -> Parts:
    """The parts of a sealed block of keys (heads, block_tokens, size)."""
    scheme, tokens = key_scheme(attributes.k_scheme), attributes.block_tokens
    digits = scheme.digits(size)
    return {
        "codes": (np.uint8, (heads, digits or size, packed_size(tokens, attributes.k_bits))),
        "lo": (np.float16, (heads, size)),
        "scale": (np.float16, (heads, size)),
        "digits": (np.uint8, (heads, packed_size(size, DIGIT_BITS)) if digits else ABSENT),
        "token": (np.uint8, (heads, tokens) if scheme.token else ABSENT),
        "unit": (np.float16, (heads,) if scheme.token else ABSENT),
    }


def value_parts(attributes: SdpaAttributes, heads: int, size: int) -> Parts:
    """The parts of a sealed block of values (heads, block_tokens, size)."""
    tokens, groups = attributes.block_tokens, group_count(size, attributes.v_group_size)
    return {
        "codes": (np.uint8, (heads, tokens, packed_size(size, attributes.v_bits))),
        "lo": (np.float16, (heads, tokens, groups) if attributes.v_scheme == AFFINE else ABSENT),
        "scale": (np.float16, (heads, tokens, groups)),
        "digits": (np.uint8, ABSENT),
        "token": (np.uint8, ABSENT),
        "unit": (np.float16, ABSENT),
    }


def side_bytes(parts: Parts) -> int:
    """Bytes of a side in codes."""
    return sum(np.dtype(kind).itemsize * math.prod(shape) for kind, shape in parts.values() if shape != ABSENT)
