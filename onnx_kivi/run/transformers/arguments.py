"""Arguments of forward() and generate(): tensors as arrays, held against what a model takes; what it can't take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...arrays import FloatArray, IntArray
from ...errors import ConfigError
from .cache import KiviCache
from .protocol import PROTOCOL

NOT_THERE = {
    "inputs_embeds": "input_ids",
    "decoder_inputs_embeds": "decoder_input_ids",
    "output_attentions": "logits alone",
    "output_hidden_states": "logits alone",
    "assistant_early_exit": "assistant_model or prompt_lookup_num_tokens",
}


def ids_of(name: str, tensor: torch.Tensor | None, vocabulary: int) -> IntArray:
    """Token ids (B, S). Raises ConfigError."""
    if tensor is None or tensor.dim() != 2 or tensor.numel() == 0:
        got = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise ConfigError(f"{name}: expected (batch, new tokens), at least one of each, got {got}")
    ids = integers(tensor)
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if outside.size:
        raise ConfigError(f"{name}: expected integers from 0 to {vocabulary - 1}, got {outside[0]}")
    return ids


def integers(tensor: torch.Tensor) -> IntArray:
    """The array of an integer tensor."""
    array: IntArray = tensor.detach().cpu().numpy()
    return np.ascontiguousarray(array.astype(np.int64))


def floats(tensor: torch.Tensor) -> FloatArray:
    """The array of a float tensor."""
    array: FloatArray = tensor.detach().float().cpu().numpy()
    return np.ascontiguousarray(array)


def mask_of(mask: torch.Tensor | None, B: int, T: int) -> IntArray:
    """A mask (B, T) of zeros and ones. Raises ConfigError for one of another shape."""
    if mask is None:
        return np.ones((B, T), np.int64)
    if tuple(mask.shape) != (B, T):
        raise ConfigError(f"attention_mask: expected (batch, tokens held and new) = {(B, T)}, got {tuple(mask.shape)}")
    return integers(mask != 0)


def checked_cache(cache: Any) -> KiviCache:
    """A cache of ours. Raises ConfigError for another's."""
    if not isinstance(cache, KiviCache):
        raise ConfigError(
            f"{PROTOCOL.cache_name}: expected a KiviCache, from new_cache() or an earlier output of this model, got "
            f"{type(cache).__name__}"
        )
    return cache


def refuse(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what would change the answer and can't be given."""
    for name, instead in NOT_THERE.items():
        value = options.get(name)
        if value is not None and value is not False:
            raise ConfigError(f"{name}: expected none, as a rewritten model has no such thing; use {instead}")
