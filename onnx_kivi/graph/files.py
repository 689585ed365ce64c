"""Reading and writing model files: clear errors, weights left where they are, nothing half-written.

External weights are never read; small tensors, which may be axes or shapes, are brought inline. `load` notes in
each external tensor the folder it came from (key `basepath` of onnx's external data); `save` drops the note and, in
another folder, copies the weight files beside the new model (as files, not through memory). A model too large for one
protobuf file gets its weights in a file of their own.
"""

from __future__ import annotations

import contextlib
import filecmp
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import external_data_helper

from ..errors import ConfigError, UnsupportedModelError
from ..paths import model_path
from ..spec import DOMAIN
from .elements import INTEGERS
from .view import Model, subgraphs

BASE = "basepath"
PROTOBUF_LIMIT = (1 << 31) - (1 << 24)
LEAST_EXTERNAL = 1024
SMALL_TENSOR = 1024  # elements: of integers, an axis list or a shape; of others, only a scalar may decide anything
ALIGNMENT = 4096


def load(path: str | os.PathLike[str]) -> Model:
    """Read the model that `model_path` finds; external weights stay on disk. Raises UnsupportedModelError."""
    file = model_path(path)
    model, folder = _parse(file), str(file.resolve().parent)
    for tensor in [*external_tensors(model)]:
        _set_entry(tensor, BASE, folder)
        _check_extent(tensor)
        if 0 <= math.prod(tensor.dims) <= (SMALL_TENSOR if tensor.data_type in INTEGERS else 1):
            external_data_helper.load_external_data_for_tensor(tensor, folder)
            tensor.data_location = onnx.TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def is_rewritten(model: Model) -> bool:
    """Whether a model imports our operators."""
    return any(opset.domain == DOMAIN for opset in model.opset_import)


def _parse(file: Path) -> Model:
    try:
        model = onnx.load_model(file, format="protobuf", load_external_data=False)
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
    if not all(isinstance(text, str) for text in _names(model.graph)):
        raise UnsupportedModelError(f"{file}: expected names in UTF-8, got other bytes: damaged; export it again")
    return model


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name in a graph and its subgraphs; protobuf gives bytes for what is not UTF-8."""
    for named in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        yield named.name
    for node in graph.node:
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output, *(a.name for a in node.attribute))
        for inner in subgraphs(node):
            yield from _names(inner)


def _check_extent(tensor: onnx.TensorProto) -> None:
    """Raises UnsupportedModelError unless the tensor's file is there and long enough."""
    source = external_file(tensor)
    if not source.is_file():
        raise UnsupportedModelError(f"{source}: expected the model's external weights, got no such file")
    try:
        end = sum(int(entry(tensor, key) or 0) for key in ("offset", "length"))
    except ValueError as error:
        raise UnsupportedModelError(f"tensor {tensor.name!r}: expected numbers in its external data: {error}") from None
    if (held := source.stat().st_size) < end:
        raise UnsupportedModelError(
            f"{source}: expected at least {end:,} bytes, which tensor {tensor.name!r} needs, got {held:,}: the file is "
            "truncated; export or download it again"
        )


def save(model: Model, path: str | os.PathLike[str], *, temporary: bool = False) -> list[Path]:
    """Write a model; returns the weight files beside it, which belong to it.

    The file gets its name when it is complete; an old one stays whole if anything fails (OSError).

    temporary: bring external weights by hard link, at no cost; onnx.checker refuses a model with such weights. Raises
    ConfigError rather than let a rewritten model replace one that is not.
    """
    file = Path(path)
    if is_rewritten(model) and _holds_original(file):
        raise ConfigError(f"{file}: expected another file, got an original; originals are never overwritten")
    shell = onnx.ModelProto()
    inline = sum(len(t.raw_data) for t in tensors(model))
    try:
        if inline >= PROTOBUF_LIMIT:
            _write_weights(model, shell, file)
        else:
            shell.CopyFrom(model)
        _bring_weights(shell, file, temporary)
        with _staged(file) as staged:
            staged.write_bytes(shell.SerializeToString())
        return [file.parent / name for name in sorted({entry(t, "location") for t in external_tensors(shell)})]
    except (EncodeError, ValueError) as error:
        raise UnsupportedModelError(f"{file}: the model can't be written as protobuf: {error}") from error


def _holds_original(file: Path) -> bool:
    try:
        return file.is_file() and not is_rewritten(_parse(file))
    except UnsupportedModelError:
        return False


def tensors(model: Model) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a model: initializers and attributes, of the graph, its subgraphs and functions."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def external_tensors(model: Model) -> Iterator[onnx.TensorProto]:
    """The tensors whose data lies in other files."""
    return (t for t in tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for a in node.attribute:
            if a.type == onnx.AttributeProto.TENSOR:
                yield a.t
            yield from a.tensors
        for graph in subgraphs(node):
            yield from _graph_tensors(graph)


def entry(tensor: onnx.TensorProto, key: str) -> str:
    """A value of a tensor's external data description, "" if absent."""
    return next((e.value for e in tensor.external_data if e.key == key), "")


def external_file(tensor: onnx.TensorProto) -> Path:
    """The file that holds a tensor's data. Raises UnsupportedModelError if it lies outside the model's folder."""
    base, location = Path(entry(tensor, BASE) or "."), Path(entry(tensor, "location"))
    if location.is_absolute() or ".." in location.parts or not location.parts:
        raise UnsupportedModelError(
            f"tensor {tensor.name!r}: expected external data in the model's folder, got {str(location)!r}"
        )
    return base / location


def _set_entry(tensor: onnx.TensorProto, key: str, value: str) -> None:
    _drop_entry(tensor, key)
    tensor.external_data.add(key=key, value=value)


def _drop_entry(tensor: onnx.TensorProto, key: str) -> None:
    for i in reversed(range(len(tensor.external_data))):
        if tensor.external_data[i].key == key:
            del tensor.external_data[i]


def _bring_weights(model: Model, file: Path, link: bool) -> None:
    """Put the weight files of `model` beside `file` and make its tensors point there."""
    placed: dict[Path, str] = {}
    for tensor in external_tensors(model):
        if not entry(tensor, BASE):
            continue
        source = external_file(tensor)
        if source not in placed:
            placed[source] = _place(source, file, entry(tensor, "location"), link)
        _set_entry(tensor, "location", placed[source])
        _drop_entry(tensor, BASE)


def _place(source: Path, file: Path, location: str, link: bool) -> str:
    """Have the weight file `source` beside `file`, under `location` unless another file has that name."""
    name = location
    target = file.parent / name
    if target.exists() and not filecmp.cmp(source, target):
        name = f"{file.stem}-{Path(location).name}"
        target = file.parent / name
    if target.exists() and filecmp.cmp(source, target):
        return name
    target.parent.mkdir(parents=True, exist_ok=True)
    with _staged(target) as staged:
        if link:
            staged.unlink()
            with contextlib.suppress(OSError):
                os.link(source, staged)
                return name
        shutil.copy2(source, staged)
    return name


def _write_weights(model: Model, shell: Model, file: Path) -> None:
    """Make `shell` a copy of `model` with the large inline initializers in a file of their own."""
    name = f"{file.name}.data"
    for field in model.DESCRIPTOR.fields:
        if field.name != "graph":
            _copy_field(model, shell, field)
    for field in model.graph.DESCRIPTOR.fields:
        if field.name != "initializer":
            _copy_field(model.graph, shell.graph, field)
    with _staged(file.parent / name) as staged, staged.open("wb") as out:
        for tensor in model.graph.initializer:
            new = shell.graph.initializer.add()
            if len(tensor.raw_data) < LEAST_EXTERNAL:
                new.CopyFrom(tensor)
                continue
            out.write(b"\0" * (-out.tell() % ALIGNMENT))
            new.name, new.data_type, new.doc_string = tensor.name, tensor.data_type, tensor.doc_string
            new.dims.extend(tensor.dims)
            new.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", name), ("offset", out.tell()), ("length", len(tensor.raw_data))):
                _set_entry(new, key, str(value))
            out.write(tensor.raw_data)


def _copy_field(source: object, target: object, field: object) -> None:
    name = field.name  # type: ignore[attr-defined]
    value = getattr(source, name)
    if hasattr(value, "CopyFrom"):
        if source.HasField(name):  # type: ignore[attr-defined]
            getattr(target, name).CopyFrom(value)
    elif hasattr(value, "extend"):
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)


class _staged:  # noqa: N801
    """A temporary file beside `file` that takes its name on success and goes away on failure."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Path:
        handle, name = tempfile.mkstemp(dir=self._file.parent, prefix=f".{self._file.name}.")
        os.close(handle)
        self._path = Path(name)
        self._path.chmod(0o666 & ~_umask())
        return self._path

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._path.replace(self._file)
        finally:
            self._path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
