"""One attack: what is done, and the error that must come of it, by class and words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import nodes
import onnx_kivi as kivi
from onnx_kivi.spec import SdpaAttributes
from onnx_kivi_models.tiny import tiny_decoder

SILENT = 4
HELD = 40
CONFIG = kivi.KiviConfig(8, 8, block_tokens=16, residual_length=8, sink_length=2)
OURS = ("CacheError", "ConfigError", "SpecMismatchError", "UnsupportedModelError")
ONNXRUNTIMES = ("InvalidArgument", "Fail", "RuntimeException", "InvalidGraph", "NotImplemented")
PYTHONS = ("TypeError", "ValueError")


@dataclass
class Scene:
    """What an attack may use: a folder, a model, a session on one host and backend, and a cache that holds tokens."""

    folder: Path
    host: str
    backend: str
    cache: Any = field(default=None)

    @cached_property
    def original(self) -> Path:
        path = self.folder / "original.onnx"
        onnx.save(tiny_decoder(), path)
        return path

    @cached_property
    def model(self) -> Path:
        path = self.folder / "model.onnx"
        kivi.save(kivi.rewrite(self.original, CONFIG)[0], path)
        return path

    @cached_property
    def session(self) -> kivi.Session:
        return self.open(self.model)

    @cached_property
    def bare(self) -> kivi.Session:
        """A session of a model of one node, which can be fed any tensors."""
        return self.open(
            nodes.model([SdpaAttributes(slot=0, block_tokens=4, residual_length=0)], "bare").SerializeToString()
        )

    def open(self, model: Any) -> kivi.Session:
        options = ort.SessionOptions()
        options.log_severity_level = SILENT
        return kivi.Session(model, options, host=self.host, backend=self.backend)

    def feeds(self, past: int = HELD, count: int = 1, rows: int = 1, **changes: Any) -> dict[str, Any]:
        at = np.tile(np.arange(past, past + count), (rows, 1))
        seen = np.ones((rows, past + count), np.int64)
        return {"input_ids": at % 250, "attention_mask": seen, "position_ids": at} | changes

    def run(self, **changes: Any) -> object:
        return self.session.run(["logits"], self.feeds(**changes), cache=self.cache)

    def refill(self) -> None:
        """Give the scene a cache of 40 tokens, most of them sealed."""
        self.cache = self.session.new_cache()
        self.session.run(["logits"], self.feeds(0, HELD), cache=self.cache)
        assert self.cache.sealed_tokens > 0


@dataclass(frozen=True)
class Case:
    """An attack by name; `raises` are the names of the classes it may end in, `words` a pattern of the message."""

    name: str
    act: Callable[[Scene], object]
    words: str
    raises: tuple[str, ...] = OURS


def cases(prefix: str, table: Mapping[str, tuple[Any, ...]]) -> Iterable[Case]:
    """Cases of a table: name -> (act, words[, classes])."""
    for name, (act, words, *raises) in table.items():
        yield Case(f"{prefix}: {name}", act, words, *raises)
