"""Reads the configuration files that lie beside a model, and has them held against the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from ...errors import ConfigError
from ...model_config import CONFIG_FILE, GENERATION_FILE, KEYS, SEQ2SEQ, ModelFacts, check_config
from ...spec import SELF
from ..session import Session
from ..signature import Signature


def open_config(source: Any) -> Any:
    """A transformers config: `source` itself, or config.json in the folder that it names. Raises ConfigError."""
    if not isinstance(source, str | os.PathLike):
        return source
    path = Path(source) / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"{path}: expected a model's configuration, got nothing there; copy the one that the model was exported "
            "with, or give config= (its folder, or a transformers config)"
        )
    return _read(transformers.AutoConfig.from_pretrained, path)


def read_generation_config(folder: Path) -> Any:
    """How to generate by default, if the folder says it. Raises ConfigError."""
    path = folder / GENERATION_FILE
    return _read(transformers.GenerationConfig.from_pretrained, path) if path.is_file() else None


def check_described(config: Any, session: Session, where: str, *, seq2seq: bool = False) -> None:
    """Raise ConfigError for a config of another model than the session's, or of another kind of model.

    seq2seq: whether the session's is the decoder beside an encoder.
    """
    text = config if seq2seq else config.get_text_config(decoder=True)
    said = {key: getattr(text, key, None) for key in KEYS} | {SEQ2SEQ: config.is_encoder_decoder}
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    layers = shared + sum(slot.kind == SELF for slot in session.nodes.slots)
    facts = ModelFacts(layers, all_layers=True, vocabulary=Signature(session).vocabulary, seq2seq=seq2seq)
    check_config(said, where, facts)


def _read(reader: Callable[[str], Any], path: Path) -> Any:
    try:
        return reader(str(path.parent))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: expected a file that transformers {transformers.__version__} reads, got: {reason}"
        ) from error
