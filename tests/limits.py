"""How far a rewritten model of the zoo may be from its original, and the measure of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import onnx_kivi as kivi
from onnx_kivi.measure.synthetic import synthetic_stepper
from onnx_kivi.run.session import open_model
from onnx_kivi.run.stepper import Stepper

Array = npt.NDArray[Any]

# Float32 sums in another order, over two layers, as a share of the logits' range.
ROUNDING = 1e-4


# float16 has 11 bits, and the original itself rounds after each operator.
HALF_ROUNDING = 2e-2


# Keys and values of 8 bits, a step of 1/255 of their range; two layers of peaked attention multiply it.
EIGHT_BITS = 0.05


def original_stepper(path: Path, batch: int = 1) -> Stepper:
    """The original, its cache inputs paired with outputs and sized as `inspect` says, with a random encoder."""
    return synthetic_stepper(open_model(path), batch=batch, facts=kivi.inspect(path).cache_facts)


def difference(expected: Array, actual: Array) -> float:
    """The largest difference as a share of the range."""
    return float(np.abs(expected - actual).max() / np.ptp(expected))
