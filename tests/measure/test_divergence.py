"""The fields of a KL divergence: what each says, on distributions that are worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnx_kivi.measure.divergence import Comparison, summed_up

EVEN, UNEVEN = np.log(np.array([0.5, 0.5])), np.log(np.array([0.25, 0.75]))
KL = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
"""Of UNEVEN from EVEN."""


def compared(*windows: tuple[list[np.ndarray], list[np.ndarray], list[int]]) -> list[Comparison]:
    return [
        Comparison.of(np.array(p, np.float32), np.array(q, np.float32), np.array(came, np.int64))
        for p, q, came in windows
    ]


def test_equal_models_differ_in_nothing() -> None:
    found = summed_up(compared(([EVEN, UNEVEN], [EVEN, UNEVEN], [0, 1])))
    assert (found.kl.value, found.kl_max, found.delta_p_rms.value, found.same_top.value) == (0, 0, 0, 1)
    assert set(found.kl_percentiles.values()) == {0.0}


def test_figures_are_over_the_tokens_of_all_windows() -> None:
    found = summed_up(compared(([UNEVEN], [EVEN], [1]), ([EVEN, EVEN], [EVEN, UNEVEN], [0, 0])))
    other = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert found.kl.value == pytest.approx((KL + other) / 3)
    assert found.kl_max == pytest.approx(max(KL, other))
    assert found.kl_min == 0
    assert found.kl_percentiles["50"] == pytest.approx(min(KL, other))
    assert found.delta_p.value == pytest.approx((0.25 + 0 + 0.25) / 3)
    assert found.delta_p_rms.value == pytest.approx(math.sqrt(2 * 0.25**2 / 3))
    assert found.delta_p_percentiles["1"] < found.delta_p_percentiles["99"]


def test_a_standard_error_is_that_of_the_mean_over_tokens() -> None:
    found = summed_up(compared(([UNEVEN, EVEN], [EVEN, EVEN], [0, 0])))
    assert found.kl.error == pytest.approx(KL / 2)
    assert found.same_top.value == 0.5
    assert found.same_top.error == pytest.approx(0.5)
    assert found.delta_p.value == pytest.approx(-0.125)
