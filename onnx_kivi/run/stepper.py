"""Feeds a decoder token by token, whether it carries its cache (an original) or keeps it (a rewritten one).

Inputs are recognised by the names that exporters give them; an input nobody knows how to fill is an error, never a
guess. Verify, generate, evaluate, bench and the demo all run models through this, and so treat both kinds alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from ..arrays import Array, FloatArray, IntArray
from ..cache_facts import CacheFacts
from ..errors import ConfigError, UnsupportedModelError
from ..naming import KEEP_INPUTS
from ..runtime.cache import Cache
from ..spec import CONTROL_INPUTS
from .signature import MERGED_FLAG, Signature

EMBEDDINGS = "inputs_embeds"
POSITIONS = "position_ids"
PREFILL_CHUNK = 64


class Stepper:
    """A batch of sequences being decoded by one model.

    session: an onnxruntime session of an original, or a Session of a rewritten model and the `cache` to use.
    facts: of the original's caches, where names and shapes don't tell. given: what the model takes beside tokens, by
    input name: an encoder's keys, values and mask; also where a cache or state that the model carries starts, else
    empty or at zero. What a slot stores is fed in the first step only. embed: ids (B, S) -> embeddings (B, S, width),
    for a model that takes those. prefill_chunk: tokens of a prompt that `last` feeds at once. Raises ConfigError for a
    prefill_chunk below 1, a given name that the model has not, or that tokens fill.
    """

    def __init__(
        self,
        session: Any,
        cache: Cache | None = None,
        *,
        facts: CacheFacts | None = None,
        given: Mapping[str, Array] | None = None,
        embed: Callable[[IntArray], Array] | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        self._cache = cache
        self._run = session.run if cache is None else partial(session.run, cache=cache)
        self._signature = Signature(session, facts)
        self._given = dict(given or {})
        self._embed = embed
        self._known: dict[str, Array] | None = None
        self._chunk = positive("prefill_chunk", prefill_chunk)
        self.length = cache.length if cache is not None else 0
        _check_given(self._given, self._signature)

    def step(self, ids: IntArray, mask: IntArray | None = None, *, keep: int = 0) -> FloatArray:
        """Logits (B, S, vocabulary) of the new tokens `ids` (B, S); `mask` (B, T) is 0 at padding, None = no padding.

        keep: logits of so many of the last tokens are enough, 0 = of all; a model that can't leave any out gives all.
        Raises UnsupportedModelError for a model whose inputs can't be filled or that has no logits.
        """
        known = self._start(ids.shape[0]) if self._known is None else self._known
        if mask is None:
            mask = np.ones((ids.shape[0], self.length + ids.shape[1]), np.int64)
        embeddings = {EMBEDDINGS: self._embed(ids)} if self._embed else {}
        signature = self._signature
        feeds = token_feeds(signature, ids, mask, {**known, **embeddings}, keep)
        results = dict(zip(signature.outputs, self._run(None, feeds), strict=True))
        carried = {name: results[out] for name, out in signature.present.items() if out and self._carries(name)}
        self._known = {name: array for name, array in known.items() if name not in signature.stored} | carried
        self.length += ids.shape[1]
        return logits_of(results)

    def last(self, ids: IntArray) -> FloatArray:
        """Logits (B, vocabulary) of the last of the new tokens `ids` (B, S), which are fed in chunks.

        Chunks end at multiples of prefill_chunk; one that fails leaves those before it in the cache. A model that
        carries a cache or state itself is fed all at once: a chunk would copy it, and such models often take none.
        """
        count = ids.shape[1]
        ends = [count] if self._signature.present else chunk_ends(self.length, count, self._chunk)
        for begin, end in pairwise((0, *ends)):
            logits = self.step(ids[:, begin:end], keep=1)
        return logits[:, -1]

    def restart(self) -> None:
        """Forget all tokens."""
        self._known = None
        self.length = 0
        if self._cache is not None:
            self._cache.reset()

    def resume(self, past: Mapping[str, Array], length: int) -> None:
        """Stand as if `length` tokens had been fed, which an original carries as `past`."""
        self._known = {**self._given, **past}
        self.length = length

    @property
    def vocabulary(self) -> int | None:
        """Tokens that the model knows, where it says."""
        return self._signature.vocabulary

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches hold now."""
        carried = sum(array.nbytes for name, array in (self._known or {}).items() if name in self._signature.present)
        return carried + (self._cache.nbytes if self._cache else 0)

    @property
    def sealed_tokens(self) -> int:
        """Tokens held in quantized form; 0 for an original."""
        return self._cache.sealed_tokens if self._cache else 0

    def _carries(self, past: str) -> bool:
        """Whether the next step needs what this one gives: always of a cache that grows, of an encoder's the first."""
        return self.length == 0 or not self._signature.is_encoders(past)

    def _start(self, batch: int) -> dict[str, Array]:
        """What is fed beside tokens in a first step."""
        signature = self._signature
        own = [name for name in signature.present if not signature.is_encoders(name) or signature.makes(name)]
        empty = {name: np.zeros(signature.past_shape(name, batch, 0), signature.element(name)) for name in own}
        return {**empty, **self._given}


def positive(name: str, value: int) -> int:
    """The number itself. Raises ConfigError unless it is an integer of at least 1."""
    if not isinstance(value, int | np.integer) or value < 1:
        raise ConfigError(f"{name}: expected an integer >= 1, got {value!r}")
    return int(value)


def chunk_ends(length: int, count: int, chunk: int) -> list[int]:
    """Where chunks of `count` new tokens behind `length` others end, counted from the first new one.

    Each but the last ends at a multiple of `chunk` tokens held, so that the same tokens are cut alike however many of
    them were there before.
    """
    return [*range(chunk - length % chunk, count, chunk), count]


def token_feeds(
    signature: Signature, ids: IntArray, mask: IntArray, known: Mapping[str, Array], keep: int = 0
) -> dict[str, Array]:
    """Feeds for one step: tokens (B, S) and what follows from them and from the mask (B, T), and what is `known`.

    keep: of how many of the last tokens logits are asked for, where the model can be asked; 0 = of all. Raises
    UnsupportedModelError naming an input that nobody knows how to fill.
    """
    feeds = {}
    for name in signature.inputs:
        if name in known:
            feeds[name] = known[name]
        elif name in TOKEN_INPUTS:
            feeds[name] = np.asarray(TOKEN_INPUTS[name](ids, mask)).astype(signature.element(name), copy=False)
        elif name not in signature.stored and name not in CONTROL_INPUTS and name not in KEEP_INPUTS:
            raise UnsupportedModelError(_unfillable(name, signature))
    if signature.keep and (keep or signature.keep.name in signature.inputs):
        feeds[signature.keep.name] = np.full([1] * len(signature.keep.shape), keep, np.int64)
    return feeds


def _unfillable(name: str, signature: Signature) -> str:
    if name == EMBEDDINGS:
        return (
            f"input {name}: expected a model that takes input_ids, got one that takes embeddings of them; embed the "
            "tokens and feed the model yourself with Session.run"
        )
    return (
        f"input {name}: expected a name that decoders usually have ({', '.join(TOKEN_INPUTS)}), got {name} "
        f"{signature.inputs[name].shape}; give it to generate as one of its `inputs`, or feed the model yourself with "
        "Session.run"
    )


def _check_given(given: Mapping[str, Array], signature: Signature) -> None:
    filled = {*TOKEN_INPUTS, *CONTROL_INPUTS, *KEEP_INPUTS, EMBEDDINGS}
    free = [name for name in signature.inputs if name not in filled]
    unknown = [name for name in given if name not in free]
    if unknown:
        raise ConfigError(
            f"inputs: expected names of inputs that tokens don't fill ({', '.join(free) or 'this model has none'}), "
            f"got {', '.join(unknown)}"
        )


def _positions(ids: IntArray, mask: IntArray) -> IntArray:
    return np.clip(np.cumsum(mask, 1) - 1, 0, None)[:, mask.shape[1] - ids.shape[1] :]


TOKEN_INPUTS: Mapping[str, Callable[[IntArray, IntArray], Any]] = {
    "input_ids": lambda ids, _: ids,
    "decoder_input_ids": lambda ids, _: ids,
    "attention_mask": lambda _, mask: mask,
    "decoder_attention_mask": lambda _, mask: mask,
    POSITIONS: _positions,
    "cache_position": lambda ids, mask: np.arange(mask.shape[1] - ids.shape[1], mask.shape[1]),
    MERGED_FLAG: lambda ids, mask: np.array([mask.shape[1] > ids.shape[1]]),
    "seqlens_k": lambda _, mask: mask.sum(1) - 1,
    "total_sequence_length": lambda _, mask: np.array(mask.shape[1]),
}


def logits_of(results: Mapping[str, Any]) -> FloatArray:
    """The logits among a run's outputs by name, as float32. Raises UnsupportedModelError if there are none."""
    if "logits" in results:
        return np.asarray(results["logits"], np.float32)
    rank_3 = [r for r in results.values() if getattr(r, "ndim", 0) == 3]
    if len(rank_3) != 1:
        raise UnsupportedModelError(f"outputs: expected one named logits, got {', '.join(results)}")
    return np.asarray(rank_3[0], np.float32)
