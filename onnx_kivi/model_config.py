"""What a configuration that lies beside a model says of it, and whether the model is so."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigError

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
SEQ2SEQ = "is_encoder_decoder"
# How many layers a decoder has: alone, and beside an encoder.
LAYERS = ("num_hidden_layers",)
DECODER_LAYERS = ("decoder_layers", "num_decoder_layers")
KEYS = (*LAYERS, *DECODER_LAYERS, "num_key_value_heads", "num_attention_heads", "vocab_size", SEQ2SEQ)


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model shows of itself; what is empty or None is not known.

    layers: those with a cache. all_layers: whether it has no others: layers may share a cache, or have none. kv_heads:
    of its caches.
    """

    layers: int
    all_layers: bool = False
    kv_heads: Collection[int] = ()
    vocabulary: int | None = None
    seq2seq: bool | None = None


def check_config(config: Mapping[str, Any], where: str, facts: ModelFacts) -> None:
    """Raise ConfigError for the first of KEYS that is there and does not fit the model."""
    for key, fitting, found in _expectations(config, facts):
        said = config.get(key)
        if isinstance(said, int) and said not in fitting:
            raise ConfigError(
                f"{where}: expected {key} to fit the model, which has {found}, got {said}; take the configuration that "
                "the model was exported with"
            )


def _expectations(config: Mapping[str, Any], facts: ModelFacts) -> Iterator[tuple[str, Collection[int], int]]:
    """Keys, the values that fit, and what the model has."""
    if facts.seq2seq is not None:
        yield SEQ2SEQ, [facts.seq2seq], facts.seq2seq
    if facts.vocabulary is not None:
        yield "vocab_size", [facts.vocabulary], facts.vocabulary
    for key in DECODER_LAYERS if config.get(SEQ2SEQ) else LAYERS:
        yield key, [facts.layers] if facts.all_layers else range(facts.layers, 1 << 31), facts.layers
    # An exporter may have repeated the heads of keys and values for those of queries.
    heads = {*facts.kv_heads}
    if heads and config.get("num_attention_heads") not in heads:
        yield "num_key_value_heads", heads, min(heads)
