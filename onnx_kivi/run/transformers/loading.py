"""Reads the configuration files that lie beside a model, and holds them against what the model says of itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers

from ...errors import ConfigError
from ...spec import SELF
from ..session import Session
from ..signature import Signature

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"


def read_config(source: Any) -> Any:
    """A transformers config: `source` itself, or config.json in the folder that it names. Raises ConfigError."""
    if not isinstance(source, str | os.PathLike):
        return source
    path = Path(source) / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{path}: expected a model's configuration, got nothing there; copy the one that the model was exported "
            "with, or give config= (its folder, or a transformers config)"
        )
    return _read(transformers.AutoConfig.from_pretrained, path)


def read_generation_config(folder: Path) -> Any:
    """How to generate by default, if the folder says it. Raises ConfigError."""
    path = folder / GENERATION_CONFIG
    return _read(transformers.GenerationConfig.from_pretrained, path) if path.is_file() else None


def check_config(config: Any, session: Session, where: Path) -> None:
    """Raise ConfigError where a config has another vocabulary or other layers than the model, or is an encoder's."""
    text = config.get_text_config(decoder=True)
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    layers = sum(slot.kind == SELF for slot in session.nodes.slots)
    facts = (
        ("is_encoder_decoder", config.is_encoder_decoder, False),
        ("vocab_size", text.vocab_size, Signature(session).vocabulary),
        ("num_hidden_layers", text.num_hidden_layers, layers + shared),
    )
    for name, said, found in facts:
        if found is not None and said != found:
            raise ConfigError(
                f"{where}: expected a config of this model, with {name} {found}, got {said}; give config= (the "
                "one that it was exported with)"
            )


def _read(reader: Callable[[str], Any], path: Path) -> Any:
    try:
        return reader(str(path.parent))
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{path}: expected a file that transformers {transformers.__version__} reads, got: {reason}"
        ) from error
