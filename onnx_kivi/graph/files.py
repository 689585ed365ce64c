"""Reading and writing model files: clear errors, weights left where they are, nothing half-written.

External weights are never read; small tensors, which may be axes or shapes, are brought inline. `load` notes in
each external tensor the folder it came from (an entry of its external data); `save` drops the note and, in
another folder, copies the weight files beside the new model (as files, not through memory). A model too large for one
protobuf file gets its weights in a file of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]

from ..errors import ConfigError, UnsupportedModelError
from ..paths import model_path, open_regular
from ..spec import DOMAIN
from ..staging import staged
from .external import attach, entry, external_tensors, tensors
from .view import Model
from .weights import bring, move_out
from .wellformed import check_wellformed

PROTOBUF_LIMIT = (1 << 31) - (1 << 24)
LARGEST_FILE = 1 << 31


def load(path: str | os.PathLike[str]) -> Model:
    """Read the model that `model_path` finds; external weights stay on disk. Raises UnsupportedModelError."""
    file = model_path(path)
    model = _parse(file)
    attach(model, file)
    return model


def is_rewritten(model: Model) -> bool:
    """Whether a model imports our operators."""
    return any(opset.domain == DOMAIN for opset in model.opset_import)


def _parse(file: Path) -> Model:
    try:
        with open_regular(file) as source:
            if (size := os.fstat(source.fileno()).st_size) > LARGEST_FILE:
                raise UnsupportedModelError(
                    f"{file}: expected an ONNX model of at most {LARGEST_FILE:,} bytes, which is protobuf's limit, got "
                    f"{size:,}"
                )
            model = onnx.load_model(source, format="protobuf", load_external_data=False)
    except FileNotFoundError:
        raise UnsupportedModelError(f"{file}: expected an ONNX model, got no such file") from None
    except OSError as error:
        raise UnsupportedModelError(f"{file}: expected a readable file, got: {error.strerror or error}") from None
    except (DecodeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{file}: expected an ONNX model, got a file that is truncated or something else ({error}); export it again"
        ) from None
    if not model.graph.node:
        raise UnsupportedModelError(f"{file}: expected an ONNX model, got a file without nodes; export it again")
    try:
        check_wellformed(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{file}: {error}") from None
    return model


def save(model: Model, path: str | os.PathLike[str], *, link: bool = False) -> list[Path]:
    """Write a model; returns the weight files beside it, which belong to it.

    The file gets its name when it is complete; an old one stays whole if anything fails (OSError). `path` is a regular
    file or a name not in use: links, folders and devices are refused (ConfigError).

    link: share external weights by hard link where the file system can, at no cost; onnx.load and onnx.checker refuse a
    model with such weights, the original too. Raises ConfigError rather than let a rewritten model replace one that is
    not.
    """
    file = Path(path)
    if is_rewritten(model) and _holds_original(file):
        raise ConfigError(f"{file}: expected another file, got an original; originals are never overwritten")
    made: list[Path] = []
    try:
        with staged(file) as out:
            shell = onnx.ModelProto()
            for new in _fill(shell, model, file, link):
                made.append(new)
            out.write(shell.SerializeToString())
    except BaseException as error:
        for new in made:
            new.unlink(missing_ok=True)
        if isinstance(error, EncodeError | ValueError) and not isinstance(error, ConfigError):
            raise UnsupportedModelError(f"{file}: the model can't be written as protobuf: {error}") from error
        raise
    return [file.parent / name for name in sorted({entry(t, "location") for t in external_tensors(shell)})]


def _fill(shell: Model, model: Model, file: Path, link: bool) -> Iterator[Path]:
    """Make `shell` what is written of `model`, with the weights beside `file`; yields the new files of weights."""
    if sum(len(t.raw_data) for t in tensors(model)) >= PROTOBUF_LIMIT:
        yield from move_out(model, shell, file)
    else:
        shell.CopyFrom(model)
    yield from bring(shell, file, link=link)


def _holds_original(file: Path) -> bool:
    try:
        return file.is_file() and not is_rewritten(_parse(file))
    except UnsupportedModelError:
        return False
