"""Tiny random decoders for tests: the plain decoder graph with seeded weights, in every spelling.

Contract: the same arguments give the same model, byte for byte, and the same seed gives the same weights in every
spelling, so that two spellings can be compared. Weights are scaled so that attention decides the logits.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import onnx

from onnx_kivi.arrays import Array

from .decoder import DecoderConfig, Spelling, Weights, emit

SHARPNESS = 2.0


def tiny_config(**changes: Any) -> DecoderConfig:
    """Two layers of four heads over two kv heads of 16 channels, 256 tokens; `changes` are fields of DecoderConfig."""
    defaults: dict[str, Any] = {
        "layers": 2,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 16,
        "feed_forward": 128,
        "vocabulary": 256,
    }
    return DecoderConfig(**(defaults | changes))


def random_weights(seed: int = 0, key_outlier: float = 0.0, sharpness: float = SHARPNESS) -> Weights:
    """Weights that depend only on seed, name and shape; `key_outlier` is added to a key bias in every 16.

    sharpness scales the attention's projections: at 2 attention is peaked, and small errors of keys grow.
    """

    def weights(name: str, shape: tuple[int, ...]) -> Array:
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        array = generator.standard_normal(shape).astype(np.float32)
        if name.endswith("norm.weight") or name.endswith("layernorm.weight"):
            return 1.0 + 0.1 * array
        if name.endswith(".bias"):
            if key_outlier and ".k_proj." in name:
                array[::16] += key_outlier
            return array
        if len(shape) == 2 and "embed" not in name:
            array *= (sharpness if name.split(".")[-2] in {"q_proj", "k_proj", "v_proj", "o_proj"} else 1.0) / np.sqrt(
                np.float32(shape[0])
            )
        return array

    return weights


def tiny_decoder(
    config: DecoderConfig | None = None,
    spelling: Spelling | None = None,
    *,
    seed: int = 0,
    key_outlier: float = 0.0,
    sharpness: float = SHARPNESS,
) -> onnx.ModelProto:
    """A decoder of `config` with random weights, written as `spelling` says."""
    return emit(config or tiny_config(), random_weights(seed, key_outlier, sharpness), spelling)
