"""A tokenizer folder: tokenizer.json (Hugging Face `tokenizers`), and the stop tokens that its config files name."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from ..paths import read_text

CONFIG_FILES = ("generation_config.json", "config.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to token ids and back. `stop_tokens` end a generation."""

    _tokenizer: Any
    stop_tokens: tuple[int, ...]

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """Read a folder. Raises UnsupportedModelError if it holds no tokenizer.json that can be read."""
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError:
            raise ConfigError("tokenizer: expected the package tokenizers; pip install 'onnx_kivi[demo]'") from None
        path = Path(folder) / "tokenizer.json"
        try:
            backend = Backend.from_str(read_text(path))
        except Exception as error:
            raise UnsupportedModelError(f"{path}: expected a tokenizers file, got: {error}") from None
        return cls(backend, _stop_tokens(Path(folder), backend))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def chat(prompt: str) -> str:
    """`prompt` as the user's turn in ChatML, the assistant's turn opened."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def _stop_tokens(folder: Path, backend: Any) -> tuple[int, ...]:
    for name in CONFIG_FILES:
        if not (folder / name).is_file():
            continue
        found = _read_object(folder / name)
        value = found.get("eos_token_id", found.get("eos_token"))
        value = value.get("content") if isinstance(value, dict) else value
        ids = value if isinstance(value, list) else [value]
        known = [backend.token_to_id(i) if isinstance(i, str) else i for i in ids]
        if any(isinstance(i, int) for i in known):
            return tuple(i for i in known if isinstance(i, int))
    return ()


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except (OSError, RecursionError, ValueError) as error:
        raise UnsupportedModelError(f"{path}: expected JSON, got: {error}") from None
    if not isinstance(found, dict):
        raise UnsupportedModelError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
