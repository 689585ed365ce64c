"""KiviForCausalLM: a rewritten decoder that transformers' generate() and pipelines take for one of their own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...arrays import FloatArray, IntArray
from ...errors import ConfigError, UnsupportedModelError
from ...model_config import CONFIG_FILE
from ...paths import model_path
from ..session import Session
from ..signature import Signature
from ..stepper import POSITIONS, PREFILL_CHUNK, chunk_ends, logits_of, token_feeds
from .cache import KiviCache
from .loading import check_described, open_config, read_generation_config
from .protocol import PROTOCOL

NOT_THERE = {
    "inputs_embeds": "input_ids",
    "output_attentions": "logits alone",
    "output_hidden_states": "logits alone",
    "assistant_early_exit": "assistant_model or prompt_lookup_num_tokens",
}


class KiviForCausalLM(GenerationMixin, torch.nn.Module):
    """A causal language model whose cache lies in `session`; what it takes and gives is as transformers has it.

    config: a transformers config; generation_config: how to generate by default, else what the config says. It runs
    where the session runs, and hands out float32 logits on the CPU; it has no parameters and nothing to train.
    Attention maps, hidden states and embeddings as inputs do not exist: asking for them raises ConfigError, as do ids
    outside the vocabulary.
    """

    main_input_name = "input_ids"
    input_modalities = ("text",)
    device = torch.device("cpu")
    dtype = torch.float32
    _is_stateful = False

    def __init__(self, session: Session, config: Any, generation_config: Any = None) -> None:
        super().__init__()
        self.session = session
        self.config = config
        self.generation_config = generation_config or GenerationConfig.from_model_config(config)
        self.name_or_path = ""
        self._signature = Signature(session)
        self._vocabulary = self._signature.vocabulary or config.get_text_config(decoder=True).vocab_size
        if self._signature.present:
            raise UnsupportedModelError(
                f"inputs: expected a model that keeps all its caches, got one that carries "
                f"{', '.join(self._signature.present)}; rewrite it without --partial"
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str],
        config: Any = None,
        *,
        host: str = "auto",
        backend: str = "auto",
        sess_options: ort.SessionOptions | None = None,
        providers: Sequence[Any] | None = None,
    ) -> KiviForCausalLM:
        """Open a rewritten model: a file, or a folder that holds model.onnx, with config.json beside it.

        config: a transformers config, or the folder of one, instead of that. generation_config.json is read where there
        is one. The rest is as Session takes it. Raises as Session does, and ConfigError for a config that is missing,
        can't be read, or is another model's.
        """
        path = model_path(model)
        session = Session(path, sess_options, providers, host=host, backend=backend)
        folder = path.parent
        chosen = open_config(folder if config is None else config)
        check_described(chosen, session, str(folder / CONFIG_FILE) if config is None else "config")
        opened = cls(session, chosen, read_generation_config(folder))
        opened.name_or_path = str(model)
        return opened

    def new_cache(self) -> KiviCache:
        """An empty cache, to be given to generate() or to the model and continued."""
        return KiviCache(self.session.new_cache())

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: KiviCache | None = None,
        cache: KiviCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Any:
        """Logits (B, S, vocabulary) of the new tokens `input_ids` (B, S), which the cache takes in.

        attention_mask: (B, tokens held + S), 0 at padding; none = no padding. position_ids: (B or 1, S), else counted
        along the mask. labels: (B, S), -100 = not counted; gives the loss of predicting each token from those before
        it. logits_to_keep: the last so many tokens, or their indices; 0 = all. A long prompt of which only the last
        logits are wanted is fed in chunks. Without a cache a new one comes with the output, unless use_cache says no.
        """
        _refuse(others)
        given = past_key_values if cache is None else cache
        held = self.new_cache() if given is None else _checked_cache(given)
        ids = self._ids(input_ids)
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        logits = torch.from_numpy(self._run(ids, attention_mask, position_ids, held, keep))
        logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        loss = None if labels is None else _loss(logits, labels.to(logits.device))
        kept = None if use_cache is False else held
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{PROTOCOL.cache_name: kept})
        return output if return_dict or return_dict is None else output.to_tuple()

    @classmethod
    def can_generate(cls) -> bool:
        """Whether generate() works."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """Whether the class came with the model."""
        return False

    def tie_weights(self) -> None:
        """Nothing to do: the weights are in the session."""

    def get_experts_implementation(self) -> dict[str, str]:
        """How experts are computed: as the session does."""
        return {}

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Give generate() a cache of ours, whatever kind the configuration asks for: all give the same tokens."""
        _refuse({name: getattr(generation_config, name, None) for name in NOT_THERE})
        given = model_kwargs.get(PROTOCOL.cache_name)
        if given is not None:
            _checked_cache(given)._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[PROTOCOL.cache_name] = self.new_cache()

    def _run(
        self, ids: IntArray, mask: torch.Tensor | None, positions: torch.Tensor | None, held: KiviCache, keep: int
    ) -> FloatArray:
        """Logits of the last `keep` new tokens at least (0: of all), which only then are cut into chunks."""
        (B, S), P = ids.shape, held.cache.length
        shown = _mask(mask, B, P + S)
        known = {}
        if positions is not None and POSITIONS in self._signature.inputs:
            along = _array(positions)[:, -S:].astype(self._signature.element(POSITIONS))
            known[POSITIONS] = np.ascontiguousarray(np.broadcast_to(along, (B, S)))
        ends = chunk_ends(P, S, PREFILL_CHUNK)
        if not 0 < keep <= S - (0, *ends)[-2]:
            ends = [S]
        try:
            for begin, end in pairwise((0, *ends)):
                part = {name: np.ascontiguousarray(array[:, begin:end]) for name, array in known.items()}
                feeds = token_feeds(self._signature, ids[:, begin:end], shown[:, : P + end], part, keep)
                results = self.session.run(None, feeds, cache=held.cache)
        except BaseException:
            held.cache.crop(min(P, held.cache.length))
            raise
        return logits_of(dict(zip(self._signature.outputs, results, strict=True)))

    def _ids(self, input_ids: torch.Tensor | None) -> IntArray:
        """Token ids (B, S). Raises ConfigError."""
        if input_ids is None or input_ids.dim() != 2 or input_ids.numel() == 0:
            got = "none" if input_ids is None else f"shape {tuple(input_ids.shape)}"
            raise ConfigError(f"input_ids: expected (batch, new tokens), at least one of each, got {got}")
        ids = _array(input_ids)
        outside = ids[(ids < 0) | (ids >= self._vocabulary)]
        if outside.size:
            raise ConfigError(f"input_ids: expected integers from 0 to {self._vocabulary - 1}, got {outside[0]}")
        return ids


def _array(tensor: torch.Tensor) -> IntArray:
    array: IntArray = tensor.detach().cpu().numpy()
    return np.ascontiguousarray(array.astype(np.int64))


def _mask(mask: torch.Tensor | None, B: int, T: int) -> IntArray:
    """A mask (B, T) of zeros and ones. Raises ConfigError for one of another shape."""
    if mask is None:
        return np.ones((B, T), np.int64)
    if tuple(mask.shape) != (B, T):
        raise ConfigError(f"attention_mask: expected (batch, tokens held and new) = {(B, T)}, got {tuple(mask.shape)}")
    return _array(mask != 0)


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _checked_cache(cache: Any) -> KiviCache:
    if not isinstance(cache, KiviCache):
        raise ConfigError(
            f"{PROTOCOL.cache_name}: expected a KiviCache, from new_cache() or an earlier output of this model, got "
            f"{type(cache).__name__}"
        )
    return cache


def _refuse(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what would change the answer and can't be given."""
    for name, instead in NOT_THERE.items():
        value = options.get(name)
        if value is not None and value is not False:
            raise ConfigError(f"{name}: expected none, as a rewritten model has no such thing; use {instead}")
