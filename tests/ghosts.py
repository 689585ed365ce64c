"""A host of a model with ghost I/O, as stock ones are: it carries what it is given, and moves rows about.

Beside the stamps a `Past` has the keys and values that they stand for, to which it does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from nodes import feeds

Array = npt.NDArray[Any]
NARROW, WIDE = (1, 4), (3, 8)


@dataclass(frozen=True)
class Past:
    """stamps: of keys and of values, (B, heads, L, channels). tokens: keys, which serve as values, (B, Hkv, P, D)."""

    stamps: tuple[Array, Array]
    tokens: Array

    def select(self, rows: Sequence[int]) -> Past:
        """Its rows in this order, some of them perhaps several times or not at all."""
        key, value = self.stamps
        return Past((key[list(rows)], value[list(rows)]), self.tokens[list(rows)])

    def cut(self, length: int) -> Past:
        """Its first tokens."""
        key, value = self.stamps
        return Past((key[:, :, :length], value[:, :, :length]), self.tokens[:, :, :length])

    def join(self, other: Past) -> Past:
        """Its rows, then those of another past."""
        pairs = zip(self.stamps, other.stamps, strict=True)
        key, value = (np.concatenate(pair) for pair in pairs)
        return Past((key, value), np.concatenate((self.tokens, other.tokens)))


def nothing(tokens: Array, width: tuple[int, int] = NARROW) -> Past:
    """An empty past for rows like those of `tokens`."""
    heads, channels = width
    empty = np.zeros((len(tokens), heads, 0, channels), np.float32)
    return Past((empty, empty), tokens[:, :, :0])


def ghost_feeds(past: Past, new: Array, **control: Any) -> dict[str, Array]:
    """What a host feeds for these new tokens behind that past."""
    B, _, S, _ = new.shape
    shapes = {"new_shape": np.array([B, S]), "mask_shape": np.array([B, past.tokens.shape[2] + S])}
    carried = dict(zip(("past_key", "past_value"), past.stamps, strict=True))
    return feeds(new, new, **control) | shapes | carried


def step(served: ort.InferenceSession, past: Past, new: Array) -> tuple[list[Array], Past]:
    """The nodes' outputs for new tokens (B, Hkv, S, D), and the past with them."""
    *outputs, key, value = served.run(None, ghost_feeds(past, new))
    return outputs[2:], Past((key, value), np.concatenate((past.tokens, new), 2))
