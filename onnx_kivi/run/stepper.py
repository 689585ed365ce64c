"""Feeds a decoder token by token, whether it carries its cache (an original) or keeps it (a rewritten one).

Inputs are recognised by the names that exporters give them; an input nobody knows how to fill is an error, never a
guess. Verify, generate, evaluate, bench and the demo all run models through this, and so treat both kinds alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..arrays import Array, FloatArray, IntArray
from ..cache_facts import CacheFacts
from ..errors import UnsupportedModelError
from ..naming import is_encoder_name, is_past_name, present_of
from ..runtime.cache import Cache
from ..spec import HANDLE_INPUT, PAST_LENGTH_INPUT, STORED_TOKENS

ENCODER_TOKENS = 7
ENCODER_PADDING = 2
ELEMENTS: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class Stepper:
    """A batch of sequences being decoded by one model.

    session: an onnxruntime session of an original, or a Session of a rewritten model and the `cache` to use.
    facts: of the original's caches, where names and shapes don't tell. given: what the model takes beside tokens and
    its own cache, an encoder's keys, values and mask, by input name. Without it a random encoder of `encoder_tokens`
    tokens, the first row's last ones padding, stands in. What a slot stores is fed in the first step only.
    """

    def __init__(
        self,
        session: Any,
        cache: Cache | None = None,
        *,
        facts: CacheFacts | None = None,
        given: Mapping[str, Array] | None = None,
        encoder_tokens: int = ENCODER_TOKENS,
    ) -> None:
        self._cache = cache
        self._run = session.run if cache is None else partial(session.run, cache=cache)
        self._inputs = session.get_inputs()
        self._outputs = [o.name for o in session.get_outputs()]
        self._facts = facts or CacheFacts()
        self._given = given
        self._encoder_tokens = encoder_tokens
        paired = self._facts.outputs
        past = [i.name for i in self._inputs if i.name in paired or is_past_name(i.name)]
        self._present = {
            name: paired.get(name) or present_of(name, self._outputs) for name in past if name != PAST_LENGTH_INPUT
        }
        self._stored = {i.name for i in self._inputs if STORED_TOKENS in i.shape}
        self._known: dict[str, Array] | None = None
        self.length = cache.length if cache is not None else 0

    def step(self, ids: IntArray, mask: IntArray | None = None) -> FloatArray:
        """Logits (B, S, vocabulary) of the new tokens `ids` (B, S); `mask` (B, T) is 0 at padding, None = no padding.

        Raises UnsupportedModelError for a model whose inputs can't be filled or that has no logits.
        """
        known = self._first(ids.shape[0], 0) if self._known is None else self._known
        if mask is None:
            mask = np.ones((ids.shape[0], self.length + ids.shape[1]), np.int64)
        wanted = [i for i in self._inputs if i.name in known or i.name not in self._stored]
        feeds = build_feeds(wanted, ids, mask, known)
        results = dict(zip(self._outputs, self._run(None, feeds), strict=True))
        carried = {name: results[out] for name, out in self._present.items() if out}
        self._known = {name: array for name, array in known.items() if name not in self._stored} | carried
        self.length += ids.shape[1]
        return _logits(results)

    def restart(self) -> None:
        """Forget all tokens."""
        self._known = None
        self.length = 0
        if self._cache is not None:
            self._cache.reset()

    def fill(self, length: int) -> None:
        """Stand as if `length` tokens had been fed: one row, random keys and values (for timing)."""
        self._known = self._first(1, length)
        self.length = length

    @property
    def cache_bytes(self) -> int:
        """Bytes that the caches hold now."""
        carried = sum(array.nbytes for name, array in (self._known or {}).items() if name in self._present)
        return carried + (self._cache.nbytes if self._cache else 0)

    @property
    def sealed_tokens(self) -> int:
        """Tokens held in quantized form; 0 for an original."""
        return self._cache.sealed_tokens if self._cache else 0

    def _first(self, batch: int, length: int) -> dict[str, Array]:
        """What is fed beside tokens in a first step that has `length` tokens behind it, at random where it must be."""
        if self._given is not None:
            carried = [name for name, output in self._present.items() if output]
            return self._random_past(carried, batch, length) | dict(self._given)
        mask = np.ones((batch, self._encoder_tokens), np.int64)
        mask[0, -ENCODER_PADDING:] = 0
        encoder = {}
        for i in self._inputs:
            if i.name == "encoder_attention_mask":
                encoder[i.name] = mask.astype(_element(i))
            elif i.name == "encoder_hidden_states":
                shape = (batch, self._encoder_tokens, i.shape[-1])
                encoder[i.name] = np.random.default_rng(1).standard_normal(shape).astype(_element(i))
        return self._random_past(self._present, batch, length) | encoder

    def _random_past(self, names: Collection[str], batch: int, length: int) -> dict[str, Array]:
        token_batch = next((i.shape[0] for i in self._inputs if i.name == "input_ids"), None)
        past = {}
        for i in self._inputs:
            if i.name not in names:
                continue
            shape = [d if isinstance(d, int) else None for d in i.shape]
            for axis, name in enumerate(i.shape):
                if shape[axis] is None and (axis == 0 or name == token_batch or "batch" in str(name)):
                    shape[axis] = batch
            if shape[-1] is None and shape.count(None) > 1:
                shape[-1] = self._facts.head_sizes.get(i.name)
            kept = is_encoder_name(i.name) or i.name in self._facts.crossed
            grows = self._present[i.name] is not None and not kept
            tokens = self._facts.capacities.get(i.name, length if grows else self._encoder_tokens)
            filled = [tokens if d is None else d for d in shape]
            past[i.name] = (
                np.random.default_rng(zlib.crc32(i.name.encode())).standard_normal(filled).astype(_element(i))
            )
        return past


def build_feeds(inputs: Sequence[Any], ids: IntArray, mask: IntArray, known: Mapping[str, Array]) -> dict[str, Array]:
    """Feeds for one step: tokens (B, S), mask (B, T), positions from the mask, and what is `known` by name.

    Raises UnsupportedModelError naming an input that nobody knows how to fill.
    """
    S = ids.shape[1]
    T = mask.shape[1]
    positions = np.clip(np.cumsum(mask, 1) - 1, 0, None)[:, T - S :]
    values: dict[str, Any] = {
        "input_ids": ids,
        "decoder_input_ids": ids,
        "attention_mask": mask,
        "decoder_attention_mask": mask,
        "position_ids": positions,
        "cache_position": np.arange(T - S, T),
        "use_cache_branch": np.array([T > S]),
        "seqlens_k": mask.sum(1) - 1,
        "total_sequence_length": np.array(T),
        "num_logits_to_keep": np.array(0),
        "logits_to_keep": np.array(0),
    }
    feeds: dict[str, Array] = {}
    for i in inputs:
        if i.name in known:
            feeds[i.name] = known[i.name]
        elif i.name in values:
            feeds[i.name] = np.asarray(values[i.name]).astype(_element(i), copy=False)
        elif i.name == "inputs_embeds":
            feeds[i.name] = _embed(ids, i.shape[-1]).astype(_element(i))
        elif i.name not in (HANDLE_INPUT, PAST_LENGTH_INPUT):
            raise UnsupportedModelError(
                f"input {i.name}: expected a name that decoders usually have ({', '.join(values)}), got {i.name} "
                f"{i.shape}; give it to generate as one of its `inputs`, or feed the model yourself with Session.run"
            )
    return feeds


def _embed(ids: IntArray, width: int) -> Array:
    table = {int(t): np.random.default_rng(int(t)).standard_normal(width) for t in np.unique(ids)}
    return np.stack([[table[int(t)] for t in row] for row in ids])


def _element(value: Any) -> Any:
    if value.type not in ELEMENTS:
        raise UnsupportedModelError(
            f"input {value.name}: expected a type NumPy can hold, got {value.type}; "
            "run the model with onnxruntime's io_binding"
        )
    return ELEMENTS[value.type]


def _logits(results: Mapping[str, Any]) -> FloatArray:
    if "logits" in results:
        return np.asarray(results["logits"], np.float32)
    rank_3 = [r for r in results.values() if getattr(r, "ndim", 0) == 3]
    if len(rank_3) != 1:
        raise UnsupportedModelError(f"outputs: expected one named logits, got {', '.join(results)}")
    return np.asarray(rank_3[0], np.float32)
