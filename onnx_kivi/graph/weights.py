"""Puts weights into files beside a model that is saved.

A weight file is never overwritten, as it may be another model's: a new one takes the first name that is free, or the
name of a file that has the same content already.
"""

from __future__ import annotations

import filecmp
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import onnx

from ..staging import place, staged
from .external import BASE, drop_entry, entry, external_file, external_tensors, set_entry
from .view import Model

LEAST_EXTERNAL = 1024
ALIGNMENT = 4096

Layout = Sequence[tuple[int, onnx.TensorProto]]


def bring(model: Model, file: Path, *, link: bool) -> Iterator[Path]:
    """Have the weight files of `model` beside `file`, and its tensors point there; yields the files that are new.

    link: by hard link where the file system can. Raises ConfigError, OSError.
    """
    placed: dict[Path, str] = {}
    for tensor in external_tensors(model):
        if not entry(tensor, BASE):
            continue
        source = external_file(tensor)
        if source not in placed:
            name, there = _name(file, entry(tensor, "location"), lambda held, s=source: _same(held, s))  # type: ignore[misc]
            placed[source] = name
            if not there:
                place(source, file.parent / name, link=link)
                yield file.parent / name
        set_entry(tensor, "location", placed[source])
        drop_entry(tensor, BASE)


def move_out(model: Model, shell: Model, file: Path) -> Iterator[Path]:
    """Make `shell` a copy of `model` with the large inline initializers in a file of their own; yields it if new."""
    for field in model.DESCRIPTOR.fields:
        if field.name != "graph":
            _copy_field(model, shell, field.name)
    for field in model.graph.DESCRIPTOR.fields:
        if field.name != "initializer":
            _copy_field(model.graph, shell.graph, field.name)
    layout = list(_layout(model))
    name, there = _name(file, f"{file.name}.data", lambda held: _holds(held, layout))
    if not there:
        with staged(file.parent / name) as out:
            for offset, tensor in layout:
                out.seek(offset)
                out.write(tensor.raw_data)
        yield file.parent / name
    offsets = {tensor.name: offset for offset, tensor in layout}
    for tensor in model.graph.initializer:
        new = shell.graph.initializer.add()
        if tensor.name in offsets:
            _point(new, tensor, name, offsets[tensor.name])
        else:
            new.CopyFrom(tensor)


def _name(file: Path, wanted: str, same: Callable[[Path], bool]) -> tuple[str, bool]:
    """(name, whether its file is there) for a weight file of `file`, `wanted` if that can be had."""
    last = Path(wanted).name
    for n in itertools.count():
        name = wanted if n == 0 else f"{file.stem}-{last}" if n == 1 else f"{file.stem}-{n}-{last}"
        held = file.parent / name
        if not os.path.lexists(held):
            return name, False
        if held.is_file() and same(held):
            return name, True
    raise AssertionError


def _same(held: Path, source: Path) -> bool:
    return held.samefile(source) or filecmp.cmp(held, source, shallow=False)


def _layout(model: Model) -> Iterator[tuple[int, onnx.TensorProto]]:
    """(offset, tensor) of the large inline initializers, each at the start of a page."""
    end = 0
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= LEAST_EXTERNAL:
            yield end, tensor
            end += len(tensor.raw_data) + -len(tensor.raw_data) % ALIGNMENT


def _holds(held: Path, layout: Layout) -> bool:
    """Whether a file has these tensors at these offsets, and nothing after them."""
    with held.open("rb") as file:
        for offset, tensor in layout:
            file.seek(offset)
            if file.read(len(tensor.raw_data)) != tensor.raw_data:
                return False
        return not file.read(1)


def _point(new: onnx.TensorProto, tensor: onnx.TensorProto, location: str, offset: int) -> None:
    new.name, new.data_type, new.doc_string = tensor.name, tensor.data_type, tensor.doc_string
    new.dims.extend(tensor.dims)
    new.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", len(tensor.raw_data))):
        set_entry(new, key, str(value))


def _copy_field(source: object, target: object, name: str) -> None:
    value = getattr(source, name)
    if hasattr(value, "CopyFrom"):
        if source.HasField(name):  # type: ignore[attr-defined]
            getattr(target, name).CopyFrom(value)
    elif hasattr(value, "extend"):
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)
