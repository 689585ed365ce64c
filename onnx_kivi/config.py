"""KiviConfig: what a user may choose when a model is rewritten."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from .errors import ConfigError
from .spec import CROSS, IO_KINDS, NO_IO, SELF, check_kv_bytes, check_store_options, check_window
from .spec_schemes import AFFINE, SYMMETRIC, V_BITS, check_schemes, k_bits_of
from .spec_types import one_of

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "lossless": {"k_bits": 8, "v_bits": 8},
    "balanced": {"k_bits": 4, "v_bits": 4, "k_scheme": "affine+token+rotated", "v_scheme": SYMMETRIC},
    "small": {"k_bits": 2, "v_bits": 3, "k_scheme": "digits:3+token", "v_scheme": SYMMETRIC},
    "smallest": {"k_bits": 2, "v_bits": 2, "k_scheme": "digits:2+token", "v_scheme": SYMMETRIC},
}
"""What `rewrite --preset` stands for, best first."""


@dataclass(frozen=True, slots=True)
class KiviConfig:
    """How the cache is kept (KIVI, arXiv 2402.02750, section 3): keys per channel, values per token.

    k_bits, v_bits: 2, 4, 8, or 32 (f32, nothing quantized). block_tokens: tokens sealed at once. v_group_size:
    channels that share value parameters, 0 = all. residual_length: recent tokens kept in f32. sink_length: first
    tokens kept in f32. layer_bits: exceptions, layer -> (k_bits, v_bits). cross: also keep an encoder's keys and
    values, which no step adds to; they have no recent tokens, and so no residual. window: a query sees only so many
    tokens, itself the last of them, and what no query can see any more is freed; 0 = what the model sees.
    window_sinks: first tokens that stay in sight all the same (StreamingLLM, arXiv 2309.17453; positions are not
    shifted). last_logits: the model gets an input num_logits_to_keep, unless it has one. io: "none", or "ghost" for
    hosts that carry a past from run to run. kv_bytes: bytes that caches may take under ghost I/O, 0 = what
    ONNX_KIVI_KV_BYTES says. k_scheme, v_scheme: how codes are made (SPEC.md, "Schemes"); a layer whose exceptional bits
    a scheme does not take is `affine`. Raises ConfigError.
    """

    k_bits: int = 8
    v_bits: int = 8
    block_tokens: int = 64
    v_group_size: int = 64
    residual_length: int = 128
    sink_length: int = 4
    layer_bits: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    cross: bool = False
    window: int = 0
    window_sinks: int = 0
    io: str = NO_IO
    kv_bytes: int = 0
    last_logits: bool = False
    k_scheme: str = AFFINE
    v_scheme: str = AFFINE

    def __post_init__(self) -> None:
        pairs = isinstance(self.layer_bits, Mapping) and all(
            isinstance(bits, tuple) and len(bits) == 2 for bits in self.layer_bits.values()
        )
        if not pairs:
            raise ConfigError(
                f"layer_bits: expected a mapping of layers to (k_bits, v_bits), such as {{0: (8, 4)}}, got "
                f"{self.layer_bits!r}"
            )
        for k_bits, v_bits in ((self.k_bits, self.v_bits), *self.layer_bits.values()):
            check_store_options(
                k_bits, v_bits, self.block_tokens, self.v_group_size, self.residual_length, self.sink_length
            )
        check_schemes(self.k_scheme, self.k_bits, self.v_scheme, self.v_bits)
        for layer in self.layer_bits:
            sides = self.sides(layer)
            check_schemes(str(sides["k_scheme"]), int(sides["k_bits"]), str(sides["v_scheme"]), int(sides["v_bits"]))
        check_window(self.window, self.window_sinks, self.sink_length)
        one_of("io", self.io, IO_KINDS)
        check_kv_bytes(self.kv_bytes)
        if self.kv_bytes and self.io == NO_IO:
            raise ConfigError(f"kv_bytes: expected 0 without ghost I/O, whose caches it limits, got {self.kv_bytes}")

    @classmethod
    def of_preset(cls, name: str, **options: Any) -> Self:
        """What `rewrite --preset` stands for, with other options as given. Raises ConfigError."""
        one_of("preset", name, tuple(PRESETS))
        return cls(**PRESETS[name], **options)

    def sides(self, layer: int) -> dict[str, int | str]:
        """Attributes of a layer's node: bits and schemes of keys and values."""
        k_bits, v_bits = self.layer_bits.get(layer, (self.k_bits, self.v_bits))
        k_scheme = self.k_scheme if k_bits in k_bits_of(self.k_scheme) else AFFINE
        v_scheme = self.v_scheme if v_bits in V_BITS[self.v_scheme] else AFFINE
        return {"k_bits": k_bits, "v_bits": v_bits, "k_scheme": k_scheme, "v_scheme": v_scheme}

    def residual(self, kind: str) -> int:
        """Recent tokens that a slot of this kind keeps in f32."""
        return 0 if kind == CROSS else self.residual_length

    def windowed(self, own: int, kind: str) -> tuple[int, int]:
        """(window, window_sinks) of a slot of this kind, whose model has a window of its `own`, 0 = none."""
        narrower = kind == SELF and self.window and not 0 < own <= self.window
        return (self.window, self.window_sinks) if narrower else (own, 0)


def parse_layer_bits(text: str) -> dict[int, tuple[int, int]]:
    """Parse the command line's `"0,29:8"` or `"0:8;29:8/4"` (layers : bits, or k_bits/v_bits). Raises ConfigError."""
    table: dict[int, tuple[int, int]] = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        try:
            layers, bits = part.split(":")
            k_bits, _, v_bits = bits.partition("/")
            for layer in layers.split(","):
                table[int(layer)] = (int(k_bits), int(v_bits or k_bits))
        except ValueError:
            raise ConfigError(
                f'layer bits: expected LAYERS:BITS such as "0,29:8" or "0:8;29:8/4", got {part!r}'
            ) from None
    return table
