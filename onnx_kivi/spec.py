"""The only definition of the ops `onnx_kivi::KvCacheStep` and `onnx_kivi::QuantizedKvSdpa`.

Node construction, the host's declaration, validation, the tests' shapes and the tables of SPEC.md
are all derived from the tables below. Dimension letters: B batch, Hq query heads, Hkv key/value
heads (Hq % Hkv == 0), S new tokens, N tokens given to append (S, or 0 to attend only), P past
tokens, T = P + N, Dk key head size, Dv value head size. S and N may be 0; B, Hq, Hkv, Dk and Dv are 1 to MAX_SIZE.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from .errors import CacheError, ConfigError, SpecMismatchError

DOMAIN = "onnx_kivi"
OPSET_VERSION = 1
SPEC_VERSION = 1
FORMAT_VERSION = 1
MIN_IR_VERSION = 8

HANDLE_INPUT = "cache_handle"
PAST_LENGTH_INPUT = "past_length"
STORED_TOKENS = "tokens_to_store"
DEFAULT_HANDLE = 0
COMMITTED_LENGTH = -1
NO_STEP = -1

SELF = "self"
CROSS = "cross"

DENSE_BITS = 32
BITS = (2, 4, 8, DENSE_BITS)
MAX_BLOCK_TOKENS = 1024
MAX_LAYERS = MAX_SLOT = MAX_SINK_LENGTH = MAX_SIZE = 1 << 16
MAX_RESIDUAL_LENGTH = MAX_V_GROUP_SIZE = 1 << 20
MAX_WINDOW = 1 << 40

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
    """Signature of one op of the domain."""

    name: str
    doc: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]


def _attribute(meaning: str, default: Any = dataclasses.MISSING) -> Any:
    return field(default=default, metadata={"meaning": meaning})


class _NodeAttributes:
    """Typed attributes of one op; floats travel as decimal strings, because a float attribute reaches a
    Python op of onnxruntime-extensions as text of 6 digits."""

    __slots__ = ()

    @classmethod
    def specs(cls) -> tuple[AttributeSpec, ...]:
        rows = []
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            wire: Wire = "int" if f.type == "int" else "string"
            default = None if f.default is dataclasses.MISSING else _to_wire(f.default)
            rows.append(AttributeSpec(f.name, wire, default, f.metadata["meaning"]))
        return tuple(rows)

    def to_wire(self) -> dict[str, int | str]:
        """Attribute values as a node carries them."""
        return {spec.name: _to_wire(getattr(self, spec.name)) for spec in self.specs()}

    @classmethod
    def from_wire(cls, values: Mapping[str, int | str | bytes]) -> Self:
        """Parse and validate a node's attributes (missing ones take their default).

        An int may also be given as its decimal digits, because that is how it reaches a Python op. Raises
        SpecMismatchError for another spec version, ConfigError for anything else.
        """
        version = _from_wire("spec_version", "int", values.get("spec_version", SPEC_VERSION))
        if version != SPEC_VERSION:
            raise SpecMismatchError(
                f"spec_version: expected {SPEC_VERSION}, got {version}; "
                "rewrite the original model with this version of onnx_kivi"
            )
        names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in values:
            if name not in names:
                raise ConfigError(f"attribute {name}: expected one of {', '.join(names)}, got an unknown one")
        parsed: dict[str, Any] = {}
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            if f.name in values:
                parsed[f.name] = _from_wire(f.name, str(f.type), values[f.name])
            elif f.default is dataclasses.MISSING:
                raise ConfigError(f"attribute {f.name}: missing; rewrite the original model again")
        return cls(**parsed)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepAttributes(_NodeAttributes):
    """Attributes of KvCacheStep."""

    model_id: str = _attribute("identity of the rewritten model; a handle belongs to the first one that uses it")
    layers: int = _attribute("how many QuantizedKvSdpa nodes take this step's ticket; the last one commits")
    spec_version: int = _attribute("version of this table", SPEC_VERSION)

    def __post_init__(self) -> None:
        if not self.model_id:
            raise ConfigError("model_id: expected a non-empty string, got ''")
        if not (self.model_id.isascii() and self.model_id.isprintable()):
            raise ConfigError("model_id: expected printable ASCII characters, got others")
        _between("layers", self.layers, 1, MAX_LAYERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SdpaAttributes(_NodeAttributes):
    """Attributes of QuantizedKvSdpa."""

    slot: int = _attribute("which cache of the model this node reads and appends to")
    kind: str = _attribute("`self`: grows with each step; `cross`: filled once, never cropped", SELF)
    k_bits: int = _attribute("bits of a sealed key code: 2, 4, 8; 32 keeps keys in f32", 8)
    v_bits: int = _attribute("bits of a sealed value code: 2, 4, 8; 32 keeps values in f32", 8)
    block_tokens: int = _attribute("tokens sealed at once, and the tokens that share a key channel's parameters", 64)
    v_group_size: int = _attribute("channels of a token that share value parameters; 0 = the whole row", 64)
    residual_length: int = _attribute("most recent tokens that stay f32", 128)
    sink_length: int = _attribute("first tokens that stay f32 for good", 4)
    scale: float = _attribute("multiplies the scores (decimal string)", 1.0)
    softcap: float = _attribute("scores become softcap * tanh(scores / softcap); 0 = none (decimal string)", 0.0)
    is_causal: int = _attribute("1: query i sees keys j <= P + i only", 0)
    window: int = _attribute("query i sees keys P + i - window < j <= P + i only; 0 = no window", 0)
    nan_to_zero: int = _attribute(
        "1: a softmax row that is NaN (all -inf, or a NaN, +inf or score beyond float32) becomes zeros", 0
    )
    spec_version: int = _attribute("version of this table", SPEC_VERSION)

    def __post_init__(self) -> None:
        _between("slot", self.slot, 0, MAX_SLOT)
        check_store_options(
            self.k_bits, self.v_bits, self.block_tokens, self.v_group_size, self.residual_length, self.sink_length
        )
        _one_of("kind", self.kind, (SELF, CROSS))
        _one_of("is_causal", self.is_causal, (0, 1))
        _one_of("nan_to_zero", self.nan_to_zero, (0, 1))
        _between("window", self.window, 0, MAX_WINDOW)
        if not math.isfinite(self.scale):
            raise ConfigError(f"scale: expected a finite number, got {self.scale:g}")
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise ConfigError(f"softcap: expected a finite number >= 0, got {self.softcap:g}")


def check_store_options(
    k_bits: int, v_bits: int, block_tokens: int, v_group_size: int, residual_length: int, sink_length: int
) -> None:
    """Raise ConfigError unless the quantization options are ones that the op knows."""
    _one_of("k_bits", k_bits, BITS)
    _one_of("v_bits", v_bits, BITS)
    _between("block_tokens", block_tokens, 1, MAX_BLOCK_TOKENS)
    _between("v_group_size", v_group_size, 0, MAX_V_GROUP_SIZE)
    _between("residual_length", residual_length, 0, MAX_RESIDUAL_LENGTH)
    _between("sink_length", sink_length, 0, MAX_SINK_LENGTH)


def _between(name: str, value: int, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{name}: expected an integer from {least} to {most}, got {value!r}")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise ConfigError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")


KV_CACHE_STEP = OpSpec(
    name="KvCacheStep",
    doc="Opens a step on a cache: drops what lies beyond past_length and hands out the ticket that every "
    "QuantizedKvSdpa of the model takes.",
    inputs=(
        TensorSpec(HANDLE_INPUT, "int64", ("1",), "which cache; 0 = the default one of this model"),
        TensorSpec(PAST_LENGTH_INPUT, "int64", ("1",), "tokens to keep; -1 = the committed length"),
    ),
    outputs=(
        TensorSpec("past_length", "int64", ("1",), "P, the tokens that attention will see before the new ones"),
        TensorSpec("step", "int64", ("1",), "the ticket; -1 when the step could not be opened"),
    ),
    attributes=StepAttributes.specs(),
)

QUANTIZED_KV_SDPA = OpSpec(
    name="QuantizedKvSdpa",
    doc="Attends the new queries to the cache and the new tokens, then appends the new tokens, then seals full blocks.",
    inputs=(
        TensorSpec("query", "float", ("B", "Hq", "S", "Dk"), "queries, as the original attention consumed them"),
        TensorSpec(
            "key", "float", ("B", "Hkv", "N", "Dk"), "keys of the new tokens only; N = 0 attends without appending"
        ),
        TensorSpec("value", "float", ("B", "Hkv", "N", "Dv"), "values of the new tokens only"),
        TensorSpec(
            "attn_mask",
            "float",
            ("B", "Hq", "S", "T"),
            "added to the scores; each dimension is 1 or as given; shape (0) = none",
            optional=True,
            broadcast=True,
        ),
        TensorSpec(
            "head_sink",
            "float",
            ("Hq",),
            "logit of one more softmax column that carries no value; shape (0) = none",
            optional=True,
        ),
        TensorSpec("step", "int64", ("1",), "the ticket of this run"),
    ),
    outputs=(TensorSpec("output", "float", ("B", "Hq", "S", "Dv"), "softmax(scores) @ values"),),
    attributes=SdpaAttributes.specs(),
)

OPS = (KV_CACHE_STEP, QUANTIZED_KV_SDPA)
COUNTED = ("B", "Hq", "Hkv", "Dk", "Dv")


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


if __name__ == "__main__":
    from .spec_document import document

    print(document(), end="")
