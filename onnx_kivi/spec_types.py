"""The vocabulary that `spec` is written in: tensors, attributes and ops, and how they are parsed and checked."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from .errors import CacheError, ConfigError, SpecMismatchError

VERSIONS = (1, 2)
MAX_SIZE = 1 << 16
COUNTED = ("B", "Hq", "Hkv", "Dk", "Dv")
"""Letters of sizes that are from 1 to MAX_SIZE."""

Wire = Literal["int", "string"]
Element = Literal["float", "int64"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. `shape` holds a letter per dimension; an `optional` one of shape (0) is none."""

    name: str
    element: Element
    shape: tuple[str, ...]
    meaning: str
    optional: bool = False
    broadcast: bool = False


@dataclass(frozen=True, slots=True)
class AttributeSpec:
    """One attribute, with the type it has in the node proto (`wire`) and its default as written there."""

    name: str
    wire: Wire
    default: int | str | None
    meaning: str


@dataclass(frozen=True, slots=True)
class OpSpec:
    """Signature of one op of the domain; `version` is that of the spec that it came with."""

    name: str
    version: int
    doc: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]


def attribute(meaning: str, default: Any = dataclasses.MISSING, *, since: int = 1) -> Any:
    """A field of a `NodeAttributes`: what it means, and the version of the spec that brought it."""
    return field(default=default, metadata={"meaning": meaning, "since": since})


class NodeAttributes:
    """Typed attributes of one op in all its versions; `spec_version` says which of them a node carries.

    Floats travel as decimal strings, because a float attribute reaches a Python op of onnxruntime-extensions as text of
    6 digits.
    """

    __slots__ = ()

    spec_version: int

    @classmethod
    def specs(cls, version: int) -> tuple[AttributeSpec, ...]:
        """The attributes of a node of this version, in order."""
        rows = []
        for f in cls._fields(version):
            wire: Wire = "int" if f.type == "int" else "string"
            default = None if f.default is dataclasses.MISSING else _to_wire(f.default)
            rows.append(
                AttributeSpec(f.name, wire, version if f.name == "spec_version" else default, f.metadata["meaning"])
            )
        return tuple(rows)

    @classmethod
    def least(cls, **values: Any) -> Self:
        """Attributes of the lowest version that can say these values. Raises ConfigError."""
        later = [f.metadata["since"] for f in cls._fields(VERSIONS[-1]) if values.get(f.name, f.default) != f.default]
        return cls(**values | {"spec_version": max(later, default=VERSIONS[0])})

    def to_wire(self) -> dict[str, int | str]:
        """Attribute values as a node carries them."""
        return {f.name: _to_wire(getattr(self, f.name)) for f in self._fields(self.spec_version)}

    @classmethod
    def from_wire(cls, values: Mapping[str, int | str | bytes]) -> Self:
        """Parse and validate a node's attributes (missing ones take their default).

        An int may also be given as its decimal digits, because that is how it reaches a Python op. Raises
        SpecMismatchError for another spec version, ConfigError for anything else.
        """
        version = _from_wire("spec_version", "int", values.get("spec_version", VERSIONS[0]))
        if version not in VERSIONS:
            raise SpecMismatchError(
                f"spec_version: expected {' or '.join(map(str, VERSIONS))}, got {version}; "
                "rewrite the original model with this version of onnx_kivi"
            )
        names = [f.name for f in cls._fields(version)]
        for name in values:
            if name not in names:
                raise ConfigError(f"attribute {name}: expected one of {', '.join(names)}, got an unknown one")
        parsed: dict[str, Any] = {}
        for f in cls._fields(version):
            if f.name in values:
                parsed[f.name] = _from_wire(f.name, str(f.type), values[f.name])
            elif f.default is dataclasses.MISSING:
                raise ConfigError(f"attribute {f.name}: missing; rewrite the original model again")
        return cls(**parsed)

    def check_version(self) -> None:
        """Raise ConfigError where an attribute has a value that nodes of this version can't carry."""
        one_of("spec_version", self.spec_version, VERSIONS)
        known = {f.name for f in self._fields(self.spec_version)}
        for f in self._fields(VERSIONS[-1]):
            if f.name not in known and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"{f.name}: expected {f.default!r} in a node of version {self.spec_version}, got "
                    f"{getattr(self, f.name)!r}; it came with version {f.metadata['since']}"
                )

    @classmethod
    def _fields(cls, version: int) -> list[dataclasses.Field[Any]]:
        return [f for f in dataclasses.fields(cls) if f.metadata["since"] <= version]  # type: ignore[arg-type]


def _to_wire(value: int | float | str) -> int | str:
    return repr(value) if isinstance(value, float) else value


_INTEGER = re.compile(r"-?[0-9]{1,18}")
_DECIMAL = re.compile(r"-?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WIRE_NAMES = {"int": "int", "float": "float", "str": "string"}


def _from_wire(name: str, kind: str, value: object) -> Any:
    text = value.decode(errors="surrogateescape") if isinstance(value, bytes) else value
    if kind == "int" and isinstance(text, int) and not isinstance(text, bool):
        return text
    if kind == "int" and isinstance(text, str) and _INTEGER.fullmatch(text):
        return int(text)
    if kind == "float" and isinstance(text, str) and _DECIMAL.fullmatch(text) and _is_near_a_double(text):
        return float(text)
    if kind == "str" and isinstance(text, str):
        return text
    raise ConfigError(f"attribute {name}: expected {_WIRE_NAMES[kind]}, got {text!r}")


def _is_near_a_double(decimal: str) -> bool:
    """Neither beyond the largest one, nor another number than 0 that rounds to it."""
    digits = re.split("[eE]", decimal)[0].strip("-0.")
    return math.isfinite(float(decimal)) and (float(decimal) != 0 or not digits)


def between(name: str, value: int, least: int, most: int) -> None:
    """Raise ConfigError unless `value` is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name}: expected an integer from {least} to {most}, got {value!r}")


def one_of(name: str, value: object, allowed: tuple[object, ...], specified: tuple[object, ...] = ()) -> None:
    """Raise ConfigError unless `value` is one of `allowed`; one of `specified` is said to be not built yet."""
    if isinstance(value, bool) or value not in allowed:
        later = f"; {value} is specified but not built yet" if value in specified else ""
        raise ConfigError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}{later}")


def check_shapes(
    where: str, tensors: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]], dims: dict[str, int]
) -> None:
    """Bind the dimension letters of `tensors` to `shapes`, extending `dims`.

    Raises CacheError naming `where`, the tensor, the expected and the given shape. Letters already in `dims`
    (P past, say) are taken as given; T is P + N once both are known.
    """
    for spec in tensors:
        shape = shapes[spec.name]
        if spec.optional and shape == (0,):
            continue
        ok = len(shape) == len(spec.shape)
        for letter, size in zip(spec.shape, shape, strict=False):
            if letter == "T":
                dims.setdefault("T", dims["P"] + dims["N"])
            expected = int(letter) if letter.isdigit() else dims.setdefault(letter, size)
            ok = ok and (size == expected or (spec.broadcast and size == 1))
        if ok:
            _check_sizes(f"{where}: {spec.name}", spec.shape, shape)
        else:
            expected_text = ", ".join(f"{d}={dims[d]}" if d in dims else d for d in spec.shape)
            alternative = " (each may be 1)" if spec.broadcast else ""
            raise CacheError(f"{where}: {spec.name}: expected shape ({expected_text}){alternative}, got {shape}")


def _check_sizes(where: str, letters: tuple[str, ...], shape: tuple[int, ...]) -> None:
    for letter, size in zip(letters, shape, strict=True):
        if letter in COUNTED and not 1 <= size <= MAX_SIZE:
            raise CacheError(f"{where}: expected {letter} from 1 to {MAX_SIZE}, got shape {shape}")
