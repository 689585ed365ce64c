"""Damaged models: inspected and rewritten, or refused in a KiviError; nothing else is raised, nothing takes for ever.

The file's bytes are mutated as protobuf messages (fields dropped, repeated, exchanged, numbers and text changed) and as
plain bytes. What Session reads of our nodes is read of each as well.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import tempfile
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from guided import Check, flipped
from guided import fuzz as guided

NUMBERS = (0, 1, -1, 2, 7, 11, 16, 1 << 31, -(1 << 31), (1 << 63) - 1, -(1 << 63))
TEXTS = ("", "key", "past_0_key", "B", "S", "Concat", "Softmax", "onnx_kivi", "com.microsoft", "\N{SNOWMAN}")


def fuzz(args: argparse.Namespace) -> None:
    """Run this fuzzer."""
    guided(args, Path(__file__).parent / "corpus" / "models", check, mutate)


def check() -> Check:
    """What is run on each file."""
    from onnx_kivi.errors import KiviError
    from onnx_kivi.own_nodes import read_own_nodes
    from onnx_kivi.rewrite.pipeline import inspect, rewrite

    path = Path(tempfile.mkdtemp()) / "model.onnx"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        for read in (
            lambda: read_own_nodes(data),
            lambda: str(inspect(path, cross=True)),
            lambda: rewrite(path, partial=True),
        ):
            with contextlib.suppress(KiviError):
                read()

    return run


def mutate(data: bytes, chance: random.Random) -> bytes:
    """The model with some of its messages changed."""
    import onnx

    if chance.random() < 0.2:
        return flipped(data, chance)
    try:
        model = onnx.ModelProto.FromString(data)
        for _ in range(chance.randint(1, 3)):
            _change(model, chance)
        return bytes(model.SerializeToString())
    except (DecodeError, ValueError):
        return flipped(data, chance)


def _change(message: Any, chance: random.Random) -> None:
    """Walk down to some field of some message, nodes more often than not, and change it there."""
    while True:
        fields = message.ListFields()
        if not fields:
            return
        named = [f for f in fields if f[0].name in ("graph", "node", "attribute")]
        field, value = chance.choice(named) if named and chance.random() < 0.6 else chance.choice(fields)
        repeated = hasattr(value, "append") or hasattr(value, "add")
        if field.message_type is None:
            _set(message, field, value, repeated, chance)
            return
        if repeated and chance.random() < 0.15:
            _rearrange(value, chance)
            return
        message = chance.choice(value) if repeated else value


def _rearrange(values: Any, chance: random.Random) -> None:
    i, j = chance.randrange(len(values)), chance.randrange(len(values))
    match chance.randrange(3):
        case 0:
            del values[i]
        case 1:
            values.add().CopyFrom(values[i])
        case 2:
            kept = type(values[i])()
            kept.CopyFrom(values[i])
            values[i].CopyFrom(values[j])
            values[j].CopyFrom(kept)


def _set(message: Any, field: Any, value: Any, repeated: bool, chance: random.Random) -> None:
    name, kind = field.name, field.cpp_type
    if repeated:
        new = [*value]
        at = chance.randrange(len(new))
        if chance.random() < 0.3:
            new.pop(at)
        elif chance.random() < 0.3:
            new.append(chance.choice(new))
        else:
            new[at] = _value(new[at], kind, field, chance)
        del getattr(message, name)[:]
        getattr(message, name).extend(new)
    elif chance.random() < 0.2:
        message.ClearField(name)
    else:
        setattr(message, name, _value(value, kind, field, chance))


def _value(old: Any, kind: int, field: Any, chance: random.Random) -> object:
    if isinstance(old, bytes):
        return flipped(old, chance) if field.type == field.TYPE_BYTES else b"\xff"
    if isinstance(old, str):
        return chance.choice((old + "x", old[:-1], *TEXTS))
    if isinstance(old, float):
        return chance.choice((0.0, -old, 1e38, float("inf"), float("nan")))
    number = chance.choice((int(old) + 1, int(old) - 1, *NUMBERS))
    small = kind in (field.CPPTYPE_INT32, field.CPPTYPE_ENUM)
    return number % 30 if small else number
