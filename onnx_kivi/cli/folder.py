"""Rewrites a folder of optimum, genai's builder or transformers.js into a folder for the same hosts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from .. import graph
from ..errors import ConfigError, KiviError, UnsupportedModelError
from ..measure.verify import Verification
from ..model_config import CONFIG_FILE, check_config
from ..paths import MODEL_FILE, kind, tellable
from ..progress import Progress
from ..rewrite import pipeline
from ..rewrite.host_config import GENAI_FILE, Json, adapt_genai, facts_of, genai_section, read_config
from ..runtime.hosts import library_path
from ..staging import check_folder_target, place, publish, staged, staging_folder
from .rewriting import Request, Rewritten, check_writable, rewritten

MODEL_SUFFIX = ".onnx"


@dataclass(frozen=True, slots=True)
class RewrittenFolder:
    """What became of a folder. models: by name relative to it; the last one failed if any did. copied: other files."""

    models: Mapping[str, Rewritten]
    copied: int = 0

    @property
    def failure(self) -> str:
        """Why nothing was written; "" if all is well."""
        return next((f"{name}: {model.failure}" for name, model in self.models.items() if model.failure), "")

    @property
    def checked(self) -> Verification | None:
        """The verification that says most: one that failed, or the one furthest from its original."""
        checks = [model.checked for model in self.models.values() if model.checked]
        return max(checks, key=lambda check: (not check.ok, check.mean_kl), default=None)

    def to_dict(self) -> dict[str, Any]:
        """The facts that `rewrite --json` prints of a folder: all models' together, and each one's."""
        each = {name: model.to_dict() for name, model in self.models.items()}
        joined = {
            key: [item for data in each.values() for item in data[key]]
            for key in ("sites", "misses", "removed_inputs", "removed_outputs")
        }
        checked = self.checked.to_dict() if self.checked else None
        return {**joined, "verify": checked, "models": [{"file": name, **data} for name, data in each.items()]}


@dataclass(frozen=True, slots=True)
class _Source:
    """A folder to rewrite. names: its files. config, genai: its config.json and genai_config.json; None if absent."""

    folder: Path
    names: list[str]
    config: Json | None
    genai: Json | None

    @property
    def carries_a_past(self) -> bool:
        """Whether a host is to run it that carries a past: genai, or optimum with a transformers config."""
        return self.config is not None or self.genai is not None

    @property
    def models(self) -> list[str]:
        return [name for name in self.names if name.endswith(MODEL_SUFFIX)]


def _read(folder: Path) -> _Source:
    return _Source(folder, [*_files(folder)], read_config(folder / CONFIG_FILE), read_config(folder / GENAI_FILE))


def is_folder_wanted(model: str, output: Path) -> bool:
    """Whether a folder is to be written: from a folder, unless the output is named as a model."""
    return Path(model).is_dir() and output.suffix != MODEL_SUFFIX


def only_model(model: str) -> str:
    """The file to rewrite into one file: of a folder without model.onnx, its only model. Raises ConfigError."""
    folder = Path(model)
    if not folder.is_dir() or (folder / MODEL_FILE).exists():
        return model
    names = [name for name in _files(folder) if name.endswith(MODEL_SUFFIX)]
    if len(names) > 1:
        raise ConfigError(f"{folder}: expected {MODEL_FILE} or one model, got {', '.join(names)}; name one of them")
    return str(folder / names[0]) if names else model


def rewrite_folder(
    source: Path, target: Path, request: Request, progress: Progress, *, copy_weights: bool
) -> RewrittenFolder:
    """Rewrite every model of `source` that has a float cache, and bring what else is there; nothing if one fails.

    Hidden files are left behind. copy_weights: rather than share external weights by hard link. Raises KiviError,
    OSError; whatever happens, `target` is either complete or as it was.
    """
    parent = Path(os.path.realpath(tellable(target).parent))
    target = parent / target.name  # of `.` too, which has no name of its own
    _check_apart(source, target)
    check_folder_target(target)
    check_writable(parent)
    found = _read(source.absolute())
    with staging_folder(target) as outer:
        staged = outer / target.name
        staged.mkdir()
        done = _fill(found, staged, request, progress, copy_weights)
        if not done.failure:
            publish(staged, target)
        return done


def _fill(source: _Source, folder: Path, request: Request, progress: Progress, copy_weights: bool) -> RewrittenFolder:
    library = Path(library_path()) if source.genai is not None else None
    models, tensors, weights = dict[str, Rewritten](), dict[str, set[str]](), set[Path]()
    for name in source.models:
        progress(f"reading {name}", 0.0)
        model = graph.load(source.folder / name)
        weights |= graph.weight_files(model)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        done = _rewritten(source, name, model, folder / name, request, progress)
        if done is None:
            continue
        models[name] = done
        if done.failure:
            return RewrittenFolder(models)
        graph.save(model, folder / name, link=not copy_weights)
        tensors[name] = {value.name for value in (*model.graph.input, *model.graph.output)}
    if not models:
        raise UnsupportedModelError(
            f"{source.folder}: expected a model with a float cache, got {len(source.models)} models without; export "
            "the decoder with past inputs"
        )
    if library and source.genai is not None:
        ghosts = [name for name, done in models.items() if done.ghost]
        _write_genai(adapt_genai(source.genai, tensors, ghosts, library.name), folder / GENAI_FILE)
        place(library, folder / library.name, link=False)
    rest = [name for name in source.names if not os.path.lexists(folder / name)]
    for name in rest:
        shared = source.folder / name in weights and not copy_weights
        place(source.folder / name, folder / name, link=shared)
    return RewrittenFolder(models, len(rest))


def _rewritten(
    source: _Source, name: str, model: graph.Model, output: Path, request: Request, progress: Progress
) -> Rewritten | None:
    """The model, rewritten in place; None if it is left as it is: without a cache, or without one that matches."""
    try:
        findings = pipeline.examine(model, cross=request.config.cross, source=source.folder / name)
        report = findings.report
        if not report.has_cache or (request.partial and not report.sites):
            return None
        if source.config is not None:
            check_config(source.config, CONFIG_FILE, facts_of(report))
        if source.genai is not None:
            check_config(genai_section(source.genai, name), GENAI_FILE, facts_of(report))
        progress(f"rewriting {name}", 0.0)
        request = request.for_host(report) if source.carries_a_past else request
        return rewritten(source.folder / name, model, findings, request, output, progress)
    except KiviError as error:
        raise type(error)(f"{name}: {error}") from error


def _write_genai(config: Json, file: Path) -> None:
    with staged(file) as out:
        out.write(json.dumps(config, indent=4, ensure_ascii=False).encode() + b"\n")


def _check_apart(source: Path, target: Path) -> None:
    real, wanted = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if wanted.is_relative_to(real) or real.is_relative_to(wanted):
        where = "which is it" if real == wanted else "inside it" if wanted.is_relative_to(real) else "around it"
        raise ConfigError(
            f"-o: expected a folder apart from {source}, got {target}, {where}; originals are never overwritten"
        )


def _files(folder: Path) -> Iterator[str]:
    """Every file, relative to the folder, in order; hidden ones are passed over. Raises ConfigError, OSError."""
    for held, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")) + folders:
            path = Path(held, name)
            mode = path.stat().st_mode
            if S_ISREG(mode):
                yield path.relative_to(folder).as_posix()
            elif path.is_symlink() or not S_ISDIR(mode):
                what = kind(path.lstat().st_mode)
                raise ConfigError(f"{path}: expected regular files and folders, got {what}; move it out of the folder")


def _raise(error: OSError) -> None:
    raise error
