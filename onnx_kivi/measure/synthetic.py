"""Random inputs, for measurements that ask for them by name: an encoder, states and embeddings, or keys and values.

A name always gets the same numbers, so that an original and its rewrite are fed alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..arrays import Array, IntArray
from ..cache_facts import CacheFacts
from ..run.signature import Signature
from ..run.stepper import EMBEDDINGS, Stepper
from ..runtime.cache import Cache

ENCODER_TOKENS = 7
ENCODER_PADDING = 2
ENCODER_MASK, ENCODER_STATES = "encoder_attention_mask", "encoder_hidden_states"


def synthetic_stepper(
    session: Any,
    cache: Cache | None = None,
    *,
    batch: int = 1,
    length: int = 0,
    facts: CacheFacts | None = None,
    encoder_tokens: int = ENCODER_TOKENS,
) -> Stepper:
    """A Stepper of `batch` rows for which whatever the model takes beside tokens is random.

    An encoder has `encoder_tokens` tokens, the first row's last ones padding. length: tokens that an original's caches
    hold from the start, for timing. facts: as Stepper takes them.
    """
    signature = Signature(session, facts)
    encoders = [name for name in signature.present if signature.is_encoders(name)]
    own = [name for name in signature.present if name not in encoders]
    given = _past(signature, own, batch, 0) | _past(signature, encoders, batch, encoder_tokens)
    given |= _encoder(signature, batch, encoder_tokens)
    embed = (lambda ids: _embeddings(signature, ids)) if EMBEDDINGS in signature.inputs else None
    stepper = Stepper(session, cache, facts=facts, given=given, embed=embed)
    if length:
        stepper.resume(_past(signature, own, batch, length), length)
    return stepper


def _past(signature: Signature, names: Iterable[str], batch: int, tokens: int) -> dict[str, Array]:
    """Keys, values and states of a first step that has `tokens` tokens behind it."""
    return {name: _normal(signature, name, signature.past_shape(name, batch, tokens)) for name in names}


def _encoder(signature: Signature, batch: int, tokens: int) -> dict[str, Array]:
    """An encoder's output and mask, as far as the model takes them."""
    mask = np.ones((batch, tokens), np.int64)
    mask[0, -ENCODER_PADDING:] = 0
    found: dict[str, Array] = {}
    if ENCODER_MASK in signature.inputs:
        found[ENCODER_MASK] = mask.astype(signature.element(ENCODER_MASK))
    if ENCODER_STATES in signature.inputs:
        width = signature.inputs[ENCODER_STATES].shape[-1]
        found[ENCODER_STATES] = _normal(signature, ENCODER_STATES, [batch, tokens, width])
    return found


def _embeddings(signature: Signature, ids: IntArray) -> Array:
    """A random vector for each token id."""
    width = signature.inputs[EMBEDDINGS].shape[-1]
    table = {int(t): np.random.default_rng(int(t)).standard_normal(width) for t in np.unique(ids)}
    rows = np.stack([[table[int(t)] for t in row] for row in ids])
    return np.asarray(rows.astype(signature.element(EMBEDDINGS)))


def _normal(signature: Signature, name: str, shape: list[int]) -> Array:
    random = np.random.default_rng(zlib.crc32(name.encode()))
    return np.asarray(random.standard_normal(shape).astype(signature.element(name)))
