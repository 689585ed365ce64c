"""Deterministic inputs that every backend and every ISA level must agree on: blocks to quantize, attentions to compute.

The names are stable; a generator seeded by the name makes the numbers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnx_kivi.spec import SdpaAttributes
from onnx_kivi.spec_schemes import K_SCHEMES, SYMMETRIC, V_BITS, k_bits_of

FloatArray = npt.NDArray[np.float32]

V2 = {"spec_version": 2}
F32_MIN = float(np.finfo(np.float32).min)


def rng(name: str) -> np.random.Generator:
    """The generator that belongs to a name."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def normal(name: str, *shape: int) -> FloatArray:
    """Standard normal numbers that belong to a name."""
    return rng(name).standard_normal(shape, dtype=np.float32)


def blocks() -> dict[str, FloatArray]:
    """Tokens (Hkv, T, D) to quantize, from the ordinary to the hostile. All are finite."""
    shapes = {
        "even": (2, 16, 64),
        "odd": (3, 7, 5),
        "one-token": (1, 1, 9),
        "one-channel": (2, 33, 1),
        "wide": (1, 64, 130),
    }
    cases = {name: normal(name, *shape) for name, shape in shapes.items()}
    base = normal("base", 2, 16, 24)
    cases["offset-400"] = base + np.float32(400)
    cases["range-1e-6"] = base * np.float32(1e-6)
    cases["offset-400-range-1e-4"] = base * np.float32(1e-4) + np.float32(400)
    cases["constant"] = np.full((2, 16, 24), 0.1, np.float32)
    cases["zero"] = np.zeros((2, 16, 24), np.float32)
    cases["negative-zero"] = np.where(base > 0, np.float32(-0.0), np.float32(0.0))
    cases["subnormal"] = base * np.float32(1e-41)
    cases["near-float16-max"] = base * np.float32(15000)
    cases["outlier-channels"] = outlier_channels("outlier-channels", 2, 16, 24)
    cases["ties"] = np.round(base * 8) / np.float32(2)
    return cases


def unquantizable_blocks() -> dict[str, FloatArray]:
    """Tokens (Hkv, T, D) of which at least one group has no float16 parameters, or is not finite."""
    cases = {}
    for name, value in {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "1e9": 1e9, "-66000": -66000.0}.items():
        cases[name] = normal(name, 2, 16, 24)
        cases[name][1, 3, 5] = value
    cases["all-below-float16"] = normal("all-below-float16", 2, 16, 24) - np.float32(1e9)
    return cases


def outlier_channels(name: str, heads: int, tokens: int, size: int) -> FloatArray:
    """Keys as of models with key biases (Qwen2.5): a few channels have an offset tens of times the others' size."""
    keys = normal(name, heads, tokens, size)
    keys[..., 1 % size] += 60
    keys[..., size // 2] -= 150
    keys[..., -1] += 30
    return keys


@dataclass(frozen=True)
class AttendCase:
    """One call of the op on a cache that holds `past` tokens. mask: letters of BHST, 1 = broadcast, empty = none."""

    name: str
    attributes: dict[str, Any] = field(default_factory=dict)
    batch: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    k_size: int = 8
    v_size: int = 8
    past: int = 45
    queries: int = 1
    new: int | None = None
    mask: str = ""
    fill: float = -np.inf
    head_sink: bool = False

    @property
    def sdpa(self) -> SdpaAttributes:
        """The node's attributes: small blocks and no residual, so that the cache is really quantized."""
        small = {
            "block_tokens": 8,
            "residual_length": 0,
            "sink_length": 2,
            "v_group_size": 4,
            "scale": self.k_size**-0.5,
        }
        return SdpaAttributes(**{"slot": 0, **small, **self.attributes})

    @property
    def new_tokens(self) -> int:
        """Tokens appended by the call."""
        return self.queries if self.new is None else self.new

    def cached(self) -> tuple[FloatArray, FloatArray]:
        """Keys and values (B, Hkv, past, D) that fill the cache."""
        keys = np.stack(
            [outlier_channels(f"{self.name} k{b}", self.kv_heads, self.past, self.k_size) for b in range(self.batch)]
        )
        return keys, normal(self.name + " v", self.batch, self.kv_heads, self.past, self.v_size)

    def inputs(self) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray]:
        """query, key, value, attn_mask and head_sink of the call."""
        query = normal(self.name + " q", self.batch, self.q_heads, self.queries, self.k_size)
        key = normal(self.name + " nk", self.batch, self.kv_heads, self.new_tokens, self.k_size)
        value = normal(self.name + " nv", self.batch, self.kv_heads, self.new_tokens, self.v_size)
        sizes = {"B": self.batch, "H": self.q_heads, "S": self.queries, "T": self.past + self.new_tokens, "1": 1}
        mask = np.zeros((0,), np.float32)
        if self.mask:
            shape = [sizes[letter] for letter in self.mask]
            hidden = rng(self.name + " mask").random(shape) < 0.3
            mask = np.where(hidden, np.float32(self.fill), normal(self.name + " bias", *shape))
        sink = normal(self.name + " sink", self.q_heads) if self.head_sink else np.zeros((0,), np.float32)
        return query, key, value, mask, sink


def attend_cases() -> list[AttendCase]:
    """Attentions over every feature of the op, alone and combined."""
    bits = [AttendCase(f"k{k}v{v}", {"k_bits": k, "v_bits": v}) for k in (2, 4, 8, 32) for v in (2, 4, 8, 32)]
    bits += [AttendCase(f"{k}-{b}", {"k_scheme": k, "k_bits": b, **V2}) for k in K_SCHEMES[1:] for b in k_bits_of(k)]
    bits += [AttendCase(f"symmetric-{b}", {"v_scheme": SYMMETRIC, "v_bits": b, **V2}) for b in V_BITS[SYMMETRIC]]
    heads = [
        AttendCase(f"heads-{q}-{kv}", q_heads=q, kv_heads=kv, queries=s)
        for q, kv, s in ((1, 1, 1), (7, 1, 3), (6, 3, 2), (9, 3, 5))
    ]
    sizes = [
        AttendCase(f"sizes-{k}-{v}-{g}", {"k_bits": b, "v_bits": b, "v_group_size": g}, k_size=k, v_size=v, queries=2)
        for k, v, g, b in (
            (64, 64, 64, 8),
            (80, 80, 64, 4),
            (96, 64, 0, 8),
            (128, 128, 64, 4),
            (5, 3, 2, 2),
            (1, 9, 4, 4),
            (20, 12, 0, 2),
        )
    ]
    sizes += [
        AttendCase(
            f"schemes-{k}-{v}-{g}",
            {"k_scheme": ks, "k_bits": kb, "v_scheme": SYMMETRIC, "v_bits": vb, "v_group_size": g, **V2},
            k_size=k,
            v_size=v,
            queries=q,
            past=tokens,
        )
        for k, v, g, ks, kb, vb, q, tokens in (
            (64, 64, 64, "digits:2+token", 2, 2, 1, 45),
            (128, 128, 64, "digits:2.5", 2, 3, 1, 45),
            (64, 80, 64, "digits:3", 2, 3, 2, 45),
            (72, 80, 64, "affine+token+rotated", 4, 4, 1, 45),
            (96, 40, 16, "digits:2.25+token", 2, 3, 70, 333),
            (20, 9, 4, "affine+token+rotated", 2, 3, 3, 45),
            (5, 1, 0, "digits:2.5", 2, 2, 2, 45),
        )
    ]
    block_tokens = [
        AttendCase(f"block-{t}", {"block_tokens": t, "k_bits": b, "v_bits": b}, past=150)
        for t, b in ((1, 8), (5, 4), (7, 2), (16, 8), (32, 4), (64, 2), (128, 8))
    ]
    features: list[AttendCase] = [
        AttendCase("empty-cache", past=0, queries=3),
        AttendCase("no-new-tokens", new=0, queries=2),
        AttendCase("more-new-than-queries", queries=2, new=5),
        AttendCase("batch", batch=3, queries=2),
        AttendCase("causal", {"is_causal": 1}, queries=12),
        AttendCase("window", {"window": 9}, queries=4),
        AttendCase("window-1", {"window": 1, "is_causal": 1}, queries=3),
        AttendCase("softcap", {"softcap": 2.5}, queries=3),
        AttendCase("mask", mask="BHST", batch=2, queries=3),
        AttendCase("mask-finite", mask="BHST", batch=2, queries=3, fill=F32_MIN),
        AttendCase("mask-padding", mask="B11T", batch=2, queries=3),
        AttendCase("mask-heads", mask="1H1T", queries=2),
        AttendCase("mask-one", mask="1111", queries=2, fill=0.5),
        AttendCase("mask-queries", mask="11S1", queries=4, fill=F32_MIN),
        AttendCase("head-sink", head_sink=True, queries=3),
        AttendCase("residual", {"residual_length": 20, "sink_length": 0}, past=71),
        AttendCase(
            "all-together",
            {"is_causal": 1, "window": 21, "softcap": 5.0, "k_bits": 4, "v_bits": 2, "residual_length": 5},
            batch=2,
            q_heads=6,
            k_size=24,
            v_size=10,
            past=61,
            queries=7,
            mask="BHST",
            head_sink=True,
        ),
        AttendCase(
            "all-schemes-together",
            {
                "is_causal": 1,
                "window": 21,
                "softcap": 5.0,
                "residual_length": 5,
                "k_scheme": "affine+token+rotated",
                "k_bits": 4,
                "v_scheme": SYMMETRIC,
                "v_bits": 3,
                **V2,
            },
            batch=2,
            q_heads=6,
            k_size=24,
            v_size=10,
            past=61,
            queries=7,
            mask="BHST",
            head_sink=True,
        ),
        AttendCase("many-tiles", {"block_tokens": 32, "is_causal": 1}, past=2300, queries=3),
        AttendCase("many-queries", {"is_causal": 1}, past=20, queries=150),
    ]
    return bits + heads + sizes + block_tokens + features
