"""KiviForCausalLM: a rewritten decoder that transformers' generate() and pipelines take for one of their own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...arrays import FloatArray, IntArray
from ...model_config import CONFIG_FILE
from ...paths import model_path
from ..session import Session
from ..stepper import POSITIONS, PREFILL_CHUNK, chunk_ends, logits_of, token_feeds
from .arguments import ids_of, integers, mask_of, refuse
from .base import KiviModel
from .cache import KiviCache
from .loading import check_described, open_config, read_generation_config
from .protocol import PROTOCOL


class KiviForCausalLM(KiviModel):
    """A causal language model whose cache lies in `session`, see KiviModel."""

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
        refuse(others)
        held = self._held(past_key_values, cache)
        ids = ids_of("input_ids", input_ids, self._vocabulary)
        keep = logits_to_keep if isinstance(logits_to_keep, int) else 0
        logits = torch.from_numpy(self._run(ids, attention_mask, position_ids, held, keep))
        logits = logits[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]
        loss = None if labels is None else _loss(logits, labels.to(logits.device))
        kept = None if use_cache is False else held
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{PROTOCOL.cache_name: kept})
        return output if return_dict or return_dict is None else output.to_tuple()

    def _run(
        self, ids: IntArray, mask: torch.Tensor | None, positions: torch.Tensor | None, held: KiviCache, keep: int
    ) -> FloatArray:
        """Logits of the last `keep` new tokens at least (0: of all), which only then are cut into chunks."""
        (B, S), P = ids.shape, held.cache.length
        shown = mask_of(mask, B, P + S)
        known = {}
        if positions is not None and POSITIONS in self._signature.inputs:
            along = integers(positions)[:, -S:].astype(self._signature.element(POSITIONS))
            known[POSITIONS] = np.ascontiguousarray(np.broadcast_to(along, (B, S)))
        ends = chunk_ends(P, S, PREFILL_CHUNK)
        if not 0 < keep <= S - (0, *ends)[-2]:
            ends = [S]
        for begin, end in pairwise((0, *ends)):
            part = {name: np.ascontiguousarray(array[:, begin:end]) for name, array in known.items()}
            feeds = token_feeds(self._signature, ids[:, begin:end], shown[:, : P + end], part, keep)
            results = self.session.run(None, feeds, cache=held.cache)
        return logits_of(dict(zip(self._signature.outputs, results, strict=True)))


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
