"""What is not finite means the same to NumPy and to every ISA level: the words are in numpy_backend/reference.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import vectors
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import SdpaAttributes
from stepping import NOTHING, assert_sealed, model, sdpa

_native = pytest.importorskip("onnx_kivi._native", reason="nothing is compiled here", exc_type=ImportError)

LARGEST = float(np.finfo(np.float32).max)
HEADS, SIZE = 2, 8


@pytest.fixture(params=["numpy", *_native.isa_names()])
def level(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The NumPy backend, and the native one at each ISA level."""
    if request.param == "numpy":
        yield get_backend("numpy")
        return
    before = _native.isa()
    _native.use_isa(request.param)
    yield get_backend("native")
    _native.use_isa(before)


def attend(
    level: Backend,
    *,
    query: Any = None,
    key: Any = None,
    value: Any = None,
    mask: np.ndarray = NOTHING,
    sink: list[float] | None = None,
    past: int = 33,
    **options: Any,
) -> np.ndarray:
    """Output (Hq, S, Dv) of 5 queries on a cache of `past` tokens, most in sealed blocks, and 5 new ones.

    `query`, `key` and `value` change the tensors (1, H, 5, D) of the call in place.
    """
    node: SdpaAttributes = sdpa(0, sink_length=1, **options)
    handle = level.new_cache()
    if past:
        _, ticket = level.open_step(handle, -1, model())
        old = vectors.normal("old", 1, HEADS, past, SIZE)
        level.attend(ticket, node, old[:, :, :1], old, old, NOTHING, NOTHING)
        if min(node.k_bits, node.v_bits) < 32:
            assert_sealed(level, handle)
    q, k, v = (vectors.normal(name, 1, HEADS, 5, SIZE) for name in ("query", "key", "value"))
    for change, tensor in zip((query, key, value), (q, k, v), strict=True):
        if change:
            change(tensor)
    _, ticket = level.open_step(handle, -1, model())
    output = level.attend(ticket, node, q, k, v, mask, NOTHING if sink is None else np.array(sink, np.float32))
    level.close(handle)
    return np.asarray(output[0])


def put(number: float, *index: Any) -> Any:
    """A change that writes one number."""

    def change(tensor: np.ndarray) -> None:
        tensor[(0, *index)] = number

    return change


def assert_nan_rows(output: np.ndarray, *rows: tuple[Any, Any]) -> None:
    """These rows (head, query) are NaN throughout, all others finite."""
    expected = np.zeros(output.shape[:2], bool)
    for row in rows:
        expected[row] = True
    np.testing.assert_array_equal(np.isnan(output).all(-1), expected)
    assert np.isfinite(output[~expected]).all()


@pytest.mark.parametrize("bits", [2, 8, 32])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_makes_its_row_nan(level: Backend, bits: int, number: float) -> None:
    assert_nan_rows(attend(level, query=put(number, 1, 3, 2), k_bits=bits, v_bits=bits), (1, 3))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [2, 8, 32])
def test_a_score_beyond_float32_makes_its_row_nan_whatever_its_sign(level: Backend, bits: int, sign: int) -> None:
    """The query times a scale of 8 is beyond it, in every block and with every key."""
    output = attend(level, query=put(sign * LARGEST, 0, 2), k_bits=bits, v_bits=bits, scale=8.0)
    assert_nan_rows(output, (0, 2))


def test_products_that_overflow_with_either_sign_make_the_row_nan(level: Backend) -> None:
    """Whether they are fused into the sum or not, which decides the sign it overflows with, or whether it is NaN."""

    def query(tensor: np.ndarray) -> None:
        tensor[0, 1, 4] = 1e20

    def key(tensor: np.ndarray) -> None:
        tensor[0, :, :] = np.where(np.arange(SIZE) % 2, 1e20, -1e20)

    assert_nan_rows(attend(level, query=query, key=key, past=0, k_bits=32, v_bits=32), (1, 4))


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_key_that_is_not_finite_makes_the_rows_nan_that_see_it(level: Backend, number: float) -> None:
    seen = attend(level, key=put(number, 1, 2, 0), is_causal=1)
    assert_nan_rows(seen, (1, 2), (1, 3), (1, 4))


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("past", [0, 33])
def test_what_a_window_or_causality_hides_takes_no_part(level: Backend, past: int, softcap: float) -> None:
    """The tokens are in a tile that all queries work on: key and value of one that only some of them see."""

    def wreck(tensor: np.ndarray) -> None:
        tensor[0, :, 3] = [np.nan, np.inf, -np.inf, 1, np.nan, np.inf, 0, 2]

    output = attend(level, key=wreck, value=wreck, is_causal=1, past=past, softcap=softcap)
    assert_nan_rows(output, (slice(None), [3, 4]))

    def wreck_first(tensor: np.ndarray) -> None:
        tensor[0, :, 0] = np.inf

    output = attend(level, key=wreck_first, value=wreck_first, window=3, past=past, softcap=softcap)
    assert_nan_rows(output, (slice(None), [0, 1, 2]))


@pytest.mark.parametrize("past", [0, 33])
def test_an_infinite_value_is_infinite_in_the_rows_that_see_it_and_nowhere_else(level: Backend, past: int) -> None:
    output = attend(level, value=put(np.inf, 0, 3, 1), is_causal=1, past=past)
    assert np.isposinf(output[0, 3:, 1]).all()
    output[0, 3:, 1] = 0
    assert np.isfinite(output).all()


@pytest.mark.parametrize("past", [0, 33])
@pytest.mark.parametrize("number", [np.inf, np.nan])
def test_a_sink_of_infinity_or_nan_makes_its_heads_rows_nan_or_zero(level: Backend, number: float, past: int) -> None:
    assert_nan_rows(attend(level, sink=[number, 0.5], past=past), (0, slice(None)))
    output = attend(level, sink=[number, 0.5], past=past, nan_to_zero=1)
    assert (output[0] == 0).all()
    assert np.isfinite(output[1]).all()
    assert (output[1] != 0).any()


def test_a_sink_of_minus_infinity_is_none(level: Backend) -> None:
    np.testing.assert_array_equal(attend(level, sink=[-np.inf, -np.inf]), attend(level))


@pytest.mark.parametrize("number", [np.inf, np.nan])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_mask_of_infinity_or_nan_makes_its_row_nan_or_zero(level: Backend, number: float, softcap: float) -> None:
    mask = np.zeros((1, 1, 5, 38), np.float32)
    mask[..., 1, 20] = number
    assert_nan_rows(attend(level, mask=mask, softcap=softcap), (slice(None), 1))
    output = attend(level, mask=mask, softcap=softcap, nan_to_zero=1)
    assert (output[:, 1] == 0).all()
    assert np.isfinite(output).all()


def test_threads_that_share_a_row_agree_with_one_that_does_not(level: Backend) -> None:
    """Tokens are split over tasks in the native plan; the sink belongs to the first of them."""
    for sink in ([np.inf, 0.5], [np.nan, 0.5]):
        assert_nan_rows(attend(level, sink=sink, past=1501), (0, slice(None)))
    assert_nan_rows(attend(level, query=put(np.inf, 1, 3, 2), past=1501), (1, 3))


@pytest.mark.parametrize("exponent", [18, 20, 30, 38])
@pytest.mark.parametrize("bits", [4, 32])
def test_nan_counts_after_overflow_are_those_of_numpy(exponent: int, bits: int) -> None:
    """Queries and keys all of one size, so that every product is far beyond float32, or far within it."""
    size = np.float32(10.0**exponent)

    def large(tensor: np.ndarray) -> None:
        tensor[:] = np.where(tensor < 0, -size, size)

    counts = {}
    for name in ("numpy", *_native.isa_names()):
        before = _native.isa()
        if name != "numpy":
            _native.use_isa(name)
        backend = get_backend("numpy" if name == "numpy" else "native")
        counts[name] = int(np.isnan(attend(backend, query=large, key=large, k_bits=bits, v_bits=bits)).sum())
        _native.use_isa(before)
    assert set(counts.values()) == {HEADS * 5 * SIZE if exponent >= 20 else 0}
