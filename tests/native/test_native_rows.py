"""Rows of their own under the native host: the ops of version 2 in a plain onnxruntime session."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from nodes import feeds, model, native_session
from onnx_kivi import spec
from onnx_kivi.errors import CacheError, ConfigError, KiviError, SpecMismatchError
from onnx_kivi.runtime.select import get_backend
from stepping import assert_same, assert_sealed, filled, sdpa, tokens

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

NODES = [sdpa(0, spec_version=2, is_causal=1), sdpa(1, spec_version=2, k_bits=4, v_bits=2)]
MODEL = model(NODES, "rows", version=2)


@pytest.fixture(scope="module")
def served() -> ort.InferenceSession:
    return native_session(MODEL)


def right_aligned(rows: list[np.ndarray], width: int) -> np.ndarray:
    padded = np.full((len(rows), *rows[0].shape[1:2], width, rows[0].shape[3]), 1e6, np.float32)
    for b, row in enumerate(rows):
        padded[b, :, width - row.shape[2] :] = row[0]
    return padded


def test_a_ragged_run_over_caches_is_each_of_them_alone(served: ort.InferenceSession, rng: np.random.Generator) -> None:
    backend = get_backend("native")
    handles = [backend.new_cache() for _ in "abc"]
    for handle, length in zip(handles, (9, 30, 0), strict=True):
        if length:
            key = tokens(rng, length)
            served.run(None, feeds(key, key, cache_handle=handle))
    alone = [backend.fork(handle) for handle in handles]
    for new in ((3, 1, 2), (1, 1, 1)):
        keys = [tokens(rng, n) for n in new]
        wide = right_aligned(keys, max(new))
        past, rows, *outputs = served.run(None, feeds(wide, wide, cache_handle=handles, new_length=new))
        assert rows.tolist() == [backend.length(handle) for handle in alone]
        assert past.tolist() == [max(rows)]
        for b, (handle, key) in enumerate(zip(alone, keys, strict=True)):
            _, own_rows, *wanted = served.run(None, feeds(key, key, cache_handle=handle))
            assert own_rows.tolist() == [rows[b]]
            for got, want in zip(outputs, wanted, strict=True):
                np.testing.assert_allclose(got[b : b + 1, :, max(new) - new[b] :], want, atol=1e-5)
    for handle, other in zip(handles, alone, strict=True):
        assert_same(backend.export_state(handle), backend.export_state(other))
    assert_sealed(backend, handles[1])


def test_the_default_cache_takes_rows_of_one_shape_or_of_their_own(rng: np.random.Generator) -> None:
    plain = native_session(MODEL)
    key = tokens(rng, 6, batch=2)

    def lengths(**control: Any) -> list[list[int]]:
        return [output.tolist() for output in plain.run(["past", "rows"], feeds(key, key, **control))]

    assert lengths() == [[0], [0]]
    assert lengths() == [[6], [6, 6]]
    assert lengths(past_length=[12, 3], new_length=[1, 6]) == [[12], [12, 3]]
    assert lengths() == [[13], [13, 9]]


def test_attributes_may_be_left_out(rng: np.random.Generator) -> None:
    """But for those that a node of version 2 must have; the others are as the spec says."""
    wire = {a.name: None for a in spec.SdpaAttributes.specs(2) if a.default is not None}
    short = native_session(
        model([spec.SdpaAttributes(slot=0)], "short", version=2, sdpa_wire=wire, step_wire={"spec_version": None})
    )
    full = native_session(model([spec.SdpaAttributes(slot=0, spec_version=2)], "full", version=2))
    key = tokens(rng, 9)
    for got, want in zip(short.run(None, feeds(key, key)), full.run(None, feeds(key, key)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_what_a_run_refuses_names_the_row_and_leaves_every_cache_as_it_was(
    served: ort.InferenceSession, rng: np.random.Generator
) -> None:
    backend = get_backend("native")
    first, second, closed = (backend.new_cache() for _ in "abc")
    backend.close(closed)
    key, two = tokens(rng, 9), tokens(rng, 9, batch=2)
    for handle in (first, second):
        served.run(None, feeds(key, key, cache_handle=handle))
    before = [backend.export_state(handle) for handle in (first, second)]
    cases: list[tuple[dict[str, Any], str]] = [
        (feeds(two, two, cache_handle=[first, closed]), f"row 1: cache {closed}: expected an open handle"),
        (feeds(two, two, cache_handle=[first, first]), f"row 1: cache {first}: expected a cache of its own"),
        (feeds(two, two, cache_handle=[first, 0]), "row 1: cache_handle: expected a cache, got 0"),
        (feeds(two, two, cache_handle=[first, second], past_length=[9, 10]), f"row 1: cache {second}: past_length"),
        (feeds(two, two, cache_handle=[first, second], new_length=[1, 0]), "row 1: new_length: expected -1 or at"),
        (feeds(two, two, cache_handle=[first, second], new_length=[1, 10]), "row 1: new_length: expected at most 9"),
        (feeds(key, key, cache_handle=[first, second]), r"query: expected shape \(B=2"),
        (feeds(key, key) | {"past_length": np.zeros((1, 1), np.int64)}, "KvCacheStepV2: expected shape"),
        (feeds(key, key) | {"new_length": np.zeros(0, np.int64)}, "KvCacheStepV2: expected shape"),
    ]
    for inputs, message in cases:
        with pytest.raises(Exception, match="onnx_kivi CacheError: ") as caught:
            served.run(None, inputs)
        error = native.error_from(caught.value)
        assert isinstance(error, CacheError)
        with pytest.raises(CacheError, match=message):
            raise error
        for handle, state in zip((first, second), before, strict=True):
            assert_same(backend.export_state(handle), state)


def test_a_model_that_needs_one_length_says_why(rng: np.random.Generator) -> None:
    strict = native_session(model(NODES, "strict", version=2, step_wire={"one_length": "positions count from P"}))
    key = tokens(rng, 4, batch=2)
    strict.run(None, feeds(key, key))
    with pytest.raises(Exception, match=r"rows of 2 to 4 tokens: .* needs: positions count from P"):
        strict.run(None, feeds(key, key, past_length=[4, 2]))
    assert strict.run(None, feeds(key, key))[1].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("wire", "kind", "message"),
    [
        ({"k_scheme": "digits:4"}, ConfigError, "k_scheme: expected one of affine, digits:2, digits:2+token"),
        ({"dense_element": "float16"}, ConfigError, "float16 is specified but not built yet"),
        ({"window_sinks": 1}, ConfigError, "window_sinks: expected at most sink_length, 1, and a window"),
        ({"spec_version": 3}, SpecMismatchError, "spec_version: expected 1 or 2, got 3"),
        ({"spec_version": 1}, ConfigError, "attribute evict: expected one of slot, kind"),
    ],
)
def test_what_is_not_built_is_refused_when_the_model_loads(
    wire: dict[str, Any], kind: type[KiviError], message: str
) -> None:
    with pytest.raises(Exception, match="onnx_kivi") as caught:
        native_session(model(NODES, "unbuilt", version=2, sdpa_wire=wire))
    error = native.error_from(caught.value)
    assert type(error) is kind
    assert message in str(error)


def test_the_c_functions_move_and_cut_rows(rng: np.random.Generator) -> None:
    library, backend = ctypes.CDLL(native.library_path()), get_backend("native")
    numbers = ctypes.c_int64 * 3
    for name in ("kivi_gather_rows", "kivi_cache_lengths", "kivi_cache_shared_nbytes"):
        getattr(library, name).restype = ctypes.c_int64
    first, second = (filled(backend, rng, count, NODES) for count in (9, 5))
    rows = numbers(first, second, first)
    joined = ctypes.c_int64(library.kivi_gather_rows(rows, numbers(0, 0, 0), ctypes.c_int64(3)))
    lengths = numbers()
    assert library.kivi_cache_lengths(joined, lengths, ctypes.c_int64(2)) == 3
    assert list(lengths) == [9, 5, 0]
    assert library.kivi_cache_shared_nbytes(joined) == backend.nbytes(joined.value)
    assert library.kivi_crop_rows(joined, numbers(9, 2, 7), ctypes.c_int64(3)) == 0
    assert library.kivi_reorder_cache(joined, numbers(2, 1), ctypes.c_int64(2)) == 0
    assert backend.lengths(joined.value) == (7, 2)
    assert library.kivi_gather_rows(rows, numbers(0, 1, 0), ctypes.c_int64(3)) == -1


def test_a_window_frees_the_blocks_that_it_hides(rng: np.random.Generator) -> None:
    backend, handle = get_backend("native"), get_backend("native").new_cache()
    node = sdpa(0, window=10, evict=1, window_sinks=1, residual_length=2, spec_version=2)
    windowed = native_session(model([node], "window", version=2))
    for _ in range(20):
        key = tokens(rng, 5)
        windowed.run(None, feeds(key, key, cache_handle=handle))
    row = backend.export_state(handle).slots[0].rows[0]
    assert (row.freed, backend.length(handle)) == (88, 100)
    with pytest.raises(Exception, match="expected 0 or at least 98, as slot 0 has freed the tokens"):
        windowed.run(None, feeds(key, key, cache_handle=handle, past_length=50))
