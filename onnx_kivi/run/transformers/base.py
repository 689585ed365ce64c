"""KiviModel: what generate() asks of any model, answered for one whose cache lies in a session."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import GenerationMixin

from ...errors import UnsupportedModelError
from ..session import Session
from ..signature import Signature
from .arguments import NOT_THERE, checked_cache, refuse
from .cache import KiviCache
from .protocol import PROTOCOL


class KiviModel(GenerationMixin, torch.nn.Module):
    """A model whose cache lies in `session`; what it takes and gives is as transformers has it.

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
                f"{', '.join(self._signature.present)}; {self._how_to_rewrite()}"
            )

    def new_cache(self) -> KiviCache:
        """An empty cache, to be given to generate() or to the model and continued."""
        return KiviCache(self.session.new_cache())

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

    def _held(self, past_key_values: KiviCache | None, cache: KiviCache | None) -> KiviCache:
        """The cache that a call brings under either name, else a new one."""
        given = past_key_values if cache is None else cache
        return self.new_cache() if given is None else checked_cache(given)

    def _how_to_rewrite(self) -> str:
        return "rewrite it without --partial"

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Give generate() a cache of ours, whatever kind the configuration asks for: all give the same tokens."""
        refuse({name: getattr(generation_config, name, None) for name in NOT_THERE})
        given = model_kwargs.get(PROTOCOL.cache_name)
        if given is not None:
            checked_cache(given)._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[PROTOCOL.cache_name] = self.new_cache()
