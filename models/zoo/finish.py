"""What every export of the zoo goes through: the exporting machine's traces removed, checked, its logits recorded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from record import PADDING, record

LARGEST = 300_000
KEPT_METADATA = ("name_scopes", "rule_name")


def selected(wanted: Mapping[str, Sequence[str]], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The (style, architecture) pairs that `names` ask for: STYLE, STYLE/NAME, or none for all."""
    for style, architectures in wanted.items():
        for name in architectures:
            if not names or style in names or f"{style}/{name}" in names:
                print(style, name, flush=True)
                yield style, name


def finish(folder: Path, padding: int = PADDING) -> None:
    """Clean `folder`/model.onnx, move its weights inside, check its size, and record a replay beside it."""
    path = folder / "model.onnx"
    clean_file(path)
    if path.stat().st_size > LARGEST:
        raise RuntimeError(f"{path}: {path.stat().st_size} bytes, at most {LARGEST} are wanted")
    record(path, padding)


def clean_file(path: Path) -> None:
    """Clean a model and move its weights inside."""
    model = onnx.load(path)
    _clean(model)
    _clean(model.graph)
    for part in (path.with_name(f"{path.name}.data"), path):
        part.unlink(missing_ok=True)
    onnx.save(model, path)


def _clean(message: Any) -> None:
    """Drop doc strings and metadata with the exporting machine's paths, or as long as the weights, all the way down."""
    if message.HasField("doc_string"):
        message.ClearField("doc_string")
    if "metadata_props" in message.DESCRIPTOR.fields_by_name:
        kept = [(prop.key, prop.value) for prop in message.metadata_props if prop.key.endswith(KEPT_METADATA)]
        message.ClearField("metadata_props")
        for key, value in kept:
            message.metadata_props.add(key=key, value=value)
    if isinstance(message, onnx.GraphProto):
        for node in message.node:
            _clean(node)
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    _clean(attribute.g)
        for value in (*message.input, *message.output, *message.value_info, *message.initializer):
            _clean(value)
