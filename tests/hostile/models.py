"""Model files that are damaged, lie, or are made to take all memory or time: each is tried with every command."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

import onnx_kivi as kivi

from .case import OURS, Case, Scene
from .edits import EDITS

ANY = (*OURS, "NotRewrittenError")
LARGE = 1 << 62
MANY = 4_000
Maker = Callable[[Scene], bytes]
COMMANDS: dict[str, Callable[[Scene, Path], object]] = {
    "inspect": lambda _, path: kivi.inspect(path),
    "rewrite": lambda _, path: kivi.rewrite(path, partial=True),
    "Session": lambda scene, path: scene.open(path),
    "verify": lambda scene, path: kivi.verify(scene.original, path),
}


def original(scene: Scene) -> ModelProto:
    return onnx.load(scene.original)


def rewritten(scene: Scene) -> ModelProto:
    return onnx.load(scene.model)


def edited(
    edit: Callable[[ModelProto], object], of: Callable[[Scene], ModelProto] = original
) -> Callable[[Scene], bytes]:
    """The bytes of a model after an edit."""

    def made(scene: Scene) -> bytes:
        model = of(scene)
        edit(model)
        return bytes(model.SerializeToString())

    return made


def cut(share: float, of: Callable[[Scene], ModelProto]) -> Maker:
    """The first part of a model's file."""
    return lambda scene: (data := of(scene).SerializeToString())[: int(len(data) * share)]


def nested(depth: int) -> bytes:
    """Graphs in graphs: a message that holds itself, written from the inside."""
    inner: bytes = helper.make_node("Identity", ["x"], ["y"]).SerializeToString()
    for _ in range(depth):
        graph = b"\x0a" + _varint(len(inner)) + inner
        attribute = b"\x0a\x04body" + b"\x32" + _varint(len(graph)) + graph + b"\xa0\x01\x05"
        inner = b"\x22\x04Loop" + b"\x2a" + _varint(len(attribute)) + attribute
    graph = b"\x0a" + _varint(len(inner)) + inner
    return b"\x08\x0a\x42\x02\x10\x12" + b"\x3a" + _varint(len(graph)) + graph


def _varint(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def cycle(model: ModelProto) -> None:
    model.graph.node[3].input[0] = model.graph.node[-1].output[0]


def twice(model: ModelProto) -> None:
    model.graph.node[5].output[0] = model.graph.node[4].output[0]


def huge_dims(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [LARGE, LARGE]


def many_dims(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [LARGE] * MANY


def below_zero(model: ModelProto) -> None:
    model.graph.initializer[0].dims[:] = [-5, 3]


def short_data(model: ModelProto) -> None:
    next(t for t in model.graph.initializer if t.data_type == TensorProto.INT64).raw_data = b"abc"


def not_utf8_name(model: ModelProto) -> bytes:
    return bytes(model.SerializeToString().replace(b"logits", b"log\xff\xfes"))


def not_utf8_size(model: ModelProto) -> bytes:
    return bytes(model.SerializeToString().replace(b"batch", b"bat\xff\xfe"))


def external(**entries: str) -> Callable[[ModelProto], None]:
    """A weight that lies elsewhere, as the entries say."""

    def edit(model: ModelProto) -> None:
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)

    return edit


def shapes_bomb(model: ModelProto) -> None:
    """A size that doubles its number of terms with every node."""
    name = "input_ids"
    model.graph.node.insert(0, helper.make_node("Shape", [name], ["bomb.0"]))
    for i in range(60):
        model.graph.node.insert(i + 1, helper.make_node("Mul", [f"bomb.{i}", f"bomb.{i}"], [f"bomb.{i + 1}"]))
    model.graph.node.insert(61, helper.make_node("ConstantOfShape", ["bomb.60"], ["bomb"]))


def chain(model: ModelProto) -> None:
    """A mask behind many thousand nodes."""
    for i in range(MANY):
        source = "attention_mask" if i == 0 else f"chain.{i - 1}"
        model.graph.node.insert(i, helper.make_node("Identity", [source], [f"chain.{i}"]))
    for node in model.graph.node[MANY:]:
        node.input[:] = [f"chain.{MANY - 1}" if name == "attention_mask" else name for name in node.input]


def constant_bomb(model: ModelProto) -> None:
    """A constant of 2^40 elements that no byte stands for."""
    shape = numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "bomb.shape")
    model.graph.initializer.append(shape)
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["bomb.shape"], ["bomb"]))


def range_bomb(model: ModelProto) -> None:
    numbers = {"a": 0, "b": 1 << 40, "c": 1}
    model.graph.initializer.extend(numpy_helper.from_array(np.array(v), f"bomb.{n}") for n, v in numbers.items())
    model.graph.node.insert(0, helper.make_node("Range", ["bomb.a", "bomb.b", "bomb.c"], ["bomb"]))


# name: (the file's bytes, words); words None: whatever it is, read or refused, but soon.
FILES: dict[str, tuple[Maker, str | None]] = {
    "empty": (lambda _: b"", "expected"),
    "text": (lambda _: b"not a model" * 100, "expected an ONNX model"),
    "zeros": (lambda _: bytes(1 << 20), "expected an ONNX model"),
    "a zip": (lambda _: b"PK\x03\x04" + bytes(100), "expected an ONNX model"),
    "a cache": (lambda s: (s.cache.save(s.folder / "c"), (s.folder / "c").read_bytes())[1], "expected an ONNX model"),
    "a length without end": (lambda _: b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "expected"),
    "a length of 2^63": (lambda _: b"\x3a" + b"\xff" * 9 + b"\x01", "expected"),
    "groups": (lambda _: b"\x0b" * 1000, "expected"),
    "graphs within graphs, 90": (lambda _: nested(90), "expected"),
    "graphs within graphs, 5000": (lambda _: nested(5000), "expected"),
    "no graph": (edited(lambda m: m.ClearField("graph")), "expected"),
    "no opset": (edited(lambda m: m.ClearField("opset_import")), "expected"),
    "opset 0": (edited(lambda m: setattr(m.opset_import[0], "version", 0)), "expected"),
    "opset 2^62": (edited(lambda m: setattr(m.opset_import[0], "version", LARGE)), "expected"),
    "a cycle": (edited(cycle), "expected"),
    "a name twice": (edited(twice), "expected"),
    "an output of nothing": (edited(lambda m: setattr(m.graph.output[0], "name", "nothing")), "expected"),
    "huge sizes": (edited(huge_dims), None),
    "very many sizes": (edited(many_dims), "at most 32 dimensions"),
    "sizes below zero": (edited(below_zero), None),
    "data that is short": (edited(short_data), None),
    "a name that is not UTF-8": (lambda s: not_utf8_name(original(s)), "expected names in UTF-8|utf-8"),
    "a size's name that is not UTF-8": (lambda s: not_utf8_size(original(s)), "expected names in UTF-8|utf-8"),
    "weights of /etc": (edited(external(location="/etc/passwd")), "in the model's folder"),
    "weights above": (edited(external(location="../weights")), "in the model's folder"),
    "weights below and above": (edited(external(location="a/../../weights")), "in the model's folder"),
    "weights of no name": (edited(external()), "in the model's folder"),
    "weights that are a folder": (edited(external(location=".")), "expected"),
    "weights that are missing": (edited(external(location="absent")), "no such file"),
    "weights with NUL": (edited(external(location="a\0b")), "in the model's folder"),
    "weights from far": (edited(external(location="small.onnx", offset="1" * 30)), "expected"),
    "weights from -1": (edited(external(location="hostile.onnx", offset="-1")), "expected sizes"),
    "weights from text": (edited(external(location="hostile.onnx", offset="x")), "expected sizes"),
    "weights of many bytes": (edited(external(location="hostile.onnx", length=str(10**17))), "truncated"),
    "a size that explodes": (edited(shapes_bomb), None),
    "a long chain": (edited(chain), None),
    "a constant that explodes": (edited(constant_bomb), None),
    "a range that explodes": (edited(range_bomb), None),
    **{f"the first {share:.0%}": (cut(share, original), "expected") for share in (0.01, 0.1, 0.3, 0.5, 0.9, 0.99)},
    **{f"the first {share:.0%}, rewritten": (cut(share, rewritten), "expected") for share in (0.1, 0.5, 0.9)},
}


def tried(make: Maker, command: Callable[[Scene, Path], object]) -> Callable[[Scene], object]:
    def act(scene: Scene) -> object:
        path = scene.folder / "hostile.onnx"
        path.write_bytes(make(scene))
        return command(scene, path)

    return act


def _cases() -> Iterator[Case]:
    for name, (make, words) in FILES.items():
        for command, run in COMMANDS.items():
            refused = words is not None or command in ("Session", "verify")  # these take no original at all
            pattern = words if words is not None and command in ("inspect", "rewrite") else ""
            yield Case(f"{name}: {command}", tried(make, run), pattern, ANY if refused else (*ANY, "silent"))
    for name, (edit, words) in EDITS.items():
        for command in ("Session", "verify"):
            yield Case(f"{name}: {command}", tried(edited(edit, rewritten), COMMANDS[command]), words, ANY)
    for at in range(0, 10_000, 250):
        for command in ("inspect", "Session"):
            yield Case(f"byte {at} flipped: {command}", tried(flipped(at), COMMANDS[command]), "", (*ANY, "silent"))


def flipped(at: int) -> Maker:
    """A rewritten (even places) or original model with one byte inverted."""

    def made(scene: Scene) -> bytes:
        data = bytearray((rewritten if at % 500 else original)(scene).SerializeToString())
        place = at * 7919 % len(data)
        data[place : place + 1] = struct.pack("B", data[place] ^ 0xFF)
        return bytes(data)

    return made


CASES: list[Any] = list(_cases())
