"""Settings of every wrong type and size: of a rewrite, of the bare primitive, of verification."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import onnx_kivi as kivi

from .case import OURS, PYTHONS, Case, Scene, cases

ANY = (*OURS, *PYTHONS)
WRONG: dict[str, Any] = {
    "-1": -1,
    "2^31": 2**31,
    "10^20": 10**20,
    "a half": 0.5,
    "NaN": float("nan"),
    "true": True,
    "text": "8",
    "nothing": None,
    "a list": [8],
}
FIELDS = ("k_bits", "v_bits", "block_tokens", "v_group_size", "residual_length", "sink_length")


def config(name: str, value: Any) -> Callable[[Scene], object]:
    return lambda _: kivi.KiviConfig(**{name: value})


def _fields() -> Iterator[Case]:
    for name in FIELDS:
        for word, value in WRONG.items():
            yield Case(f"{name} of {word}", config(name, value), f"{name}: expected", ("ConfigError",))


LAYERS: dict[str, tuple[Any, ...]] = {
    f"layer_bits of {value!r}": (config("layer_bits", value), "expected", ANY)
    for value in ({0: 8}, {0: (8,)}, {0: (8, 3)}, {0: "88"}, [(0, 8)], "0:8", 3, None, {"a": (8, 8.5)})
}
LAYERS["layer_bits of a layer that is not there"] = (
    lambda s: kivi.rewrite(s.original, kivi.KiviConfig(layer_bits={9: (8, 8)})),
    "expected layers that the model has, 0 to 1, got .9.",
    OURS,
)
PRIMITIVE = {
    "bits of 0": (lambda _: kivi.quant_dequant(np.ones((2, 3), np.float32), 0, 1), "bits", ANY),
    "bits of 17": (lambda _: kivi.quant_dequant(np.ones((2, 3), np.float32), 17, 1), "bits", ANY),
    "an axis that is not there": (lambda _: kivi.quant_dequant(np.ones((2, 3), np.float32), 8, 5), "axis", ANY),
    "text": (lambda _: kivi.quant_dequant(np.array(["a"]), 8, 0), "", ANY),
}
VERIFY = {
    f"{name} of {value}": (
        lambda s, n=name, v=value: kivi.verify(s.original, s.model, **{n: v}),
        f"{name}: expected",
        OURS,
    )
    for name, values in (
        ("prompt", (0, -1)),
        ("steps", (0, -1)),
        ("batch", (0, -1)),
        ("seed", (-1,)),
        ("level", ("", "no")),
    )
    for value in values
} | {
    f"tolerance of {value}": (lambda s, v=value: kivi.verify(s.original, s.model, tolerance=v), "tolerance", OURS)
    for value in (-1.0, float("nan"), float("inf"))
}

CASES = [
    *_fields(),
    *cases("config", LAYERS),
    *cases("quant_dequant", PRIMITIVE),
    *cases("verify", VERIFY),
]
