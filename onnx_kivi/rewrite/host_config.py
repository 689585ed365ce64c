"""The configurations in a folder to rewrite, and what genai's says after the rewrite."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..model_config import ModelFacts
from ..paths import read_text
from ..spec import STAMP_CHANNELS
from .report import Report

GENAI_FILE = "genai_config.json"
LIBRARY_OPTION = "custom_ops_library"
SIDES = ("inputs", "outputs")
NARROW = {"num_key_value_heads": 1, "head_size": STAMP_CHANNELS}

Json = dict[str, Any]


def read_config(file: Path) -> Json | None:
    """The JSON object in a file; None if there is no such file. Raises ConfigError, OSError."""
    if not file.exists():
        return None
    try:
        config = json.loads(read_text(file))
    except ValueError as error:
        raise ConfigError(f"{file}: expected JSON, got something else ({error})") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def facts_of(report: Report) -> ModelFacts:
    """What a report says of a model that its configuration says too."""
    layers = 1 + max((site.layer for site in report.sites), default=-1)
    return ModelFacts(layers, kv_heads={site.kv_heads for site in report.sites})


def genai_section(config: Mapping[str, Any], filename: str) -> Json:
    """What genai_config.json says of one file; an empty object if nothing. Raises ConfigError for a damaged one."""
    sections = [section for section in _model(config).values() if isinstance(section, dict)]
    return next((section for section in sections if section.get("filename") == filename), {})


def adapt_genai(
    config: Mapping[str, Any], names: Mapping[str, Collection[str]], ghosts: Collection[str], library: str
) -> Json:
    """genai_config.json of a folder in which files were rewritten.

    names: the inputs and outputs of each file that was. ghosts: those of them with ghost I/O, for which genai is told
    of caches as narrow as stamps. library: where the ops are, relative to the folder. Raises ConfigError for a decoder
    that is none of the files, as a pipeline is, and for operators of others.
    """
    model = _model(config)
    decoder = model.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("filename") not in names:
        got = repr(decoder.get("filename")) if isinstance(decoder, dict) else type(decoder).__name__
        raise ConfigError(
            f"{GENAI_FILE}: expected model.decoder.filename to be one of {', '.join(names)}, which have the caches, "
            f"got {got}"
        )
    adapted = {
        key: _section(section, names[section["filename"]], library) | (NARROW if section["filename"] in ghosts else {})
        if isinstance(section, dict) and section.get("filename") in names
        else section
        for key, section in model.items()
    }
    return {**config, "model": adapted}


def _model(config: Mapping[str, Any]) -> Json:
    model = config.get("model")
    if not isinstance(model, dict):
        raise ConfigError(f"{GENAI_FILE}: expected an object 'model', got {type(model).__name__}")
    return model


def _section(section: Json, names: Collection[str], library: str) -> Json:
    options = section.get("session_options") or {}
    if options.get(LIBRARY_OPTION, library) != library:
        raise ConfigError(
            f"{GENAI_FILE}: expected no {LIBRARY_OPTION}, of which genai loads one, got {options[LIBRARY_OPTION]!r}"
        )
    kept = {key: dict(_live(section[key], names)) for key in SIDES if isinstance(section.get(key), dict)}
    return {**section, "session_options": {**options, LIBRARY_OPTION: library}, **kept}


def _live(entries: Mapping[str, Any], names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """The entries whose tensors the model still has; %d in a name stands for a layer."""
    for key, name in entries.items():
        pattern = re.escape(str(name)).replace("%d", r"\d+")
        if not isinstance(name, str) or any(re.fullmatch(pattern, held) for held in names):
            yield key, name
