"""Cache files: the round trip on and between backends, and one test per way in which a file can lie."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.backend import Backend
from onnx_kivi.runtime.cache_file import load_state, save_state
from onnx_kivi.runtime.select import get_backend
from stepping import assert_same, run, sdpa, tokens

NODES = [
    sdpa(0, k_bits=8, v_bits=4, sink_length=2),
    sdpa(1, k_bits=2, v_bits=32, residual_length=3, scale=0.1, softcap=30.0),
    sdpa(5, k_bits=4, v_bits=2, block_tokens=5, v_group_size=0, kind="cross"),
]


def filled(backend: Backend, rng: np.random.Generator) -> int:
    """Handle of a cache with every kind of content: codes, dense blocks, sinks, residual, two rows, a cross slot."""
    handle = backend.new_cache()
    key, value = tokens(rng, 18, batch=2, size=7), tokens(rng, 18, batch=2, size=5)
    key[1, 0, 6, 3] = np.inf
    query = np.zeros((2, 2, 1, 7), np.float32)
    run(backend, handle, NODES, key, value, query=query)
    assert backend.sealed_tokens(handle) > 0
    return handle


@pytest.fixture
def saved(rng: np.random.Generator, tmp_path: Path) -> Path:
    backend = get_backend("numpy")
    path = tmp_path / "saved.kv"
    save_state(path, backend.export_state(filled(backend, rng)))
    return path


def test_a_loaded_cache_is_the_saved_one_and_goes_on_as_it_would(
    backend: Backend, rng: np.random.Generator, tmp_path: Path
) -> None:
    handle = filled(backend, rng)
    save_state(tmp_path / "a.kv", backend.export_state(handle))
    loaded = backend.import_state(load_state(tmp_path / "a.kv"))
    assert_same(backend.export_state(loaded), backend.export_state(handle))
    assert backend.export_state(loaded).step == backend.export_state(handle).step
    assert backend.nbytes(loaded) == backend.nbytes(handle)
    key, value = tokens(rng, 9, batch=2, size=7), tokens(rng, 9, batch=2, size=5)
    for a, b in zip(run(backend, loaded, NODES, key, value), run(backend, handle, NODES, key, value), strict=True):
        np.testing.assert_array_equal(a, b)
    assert_same(backend.export_state(loaded), backend.export_state(handle))


def test_every_backend_writes_the_same_bytes(backend: Backend, rng: np.random.Generator, tmp_path: Path) -> None:
    numpy = get_backend("numpy")
    state = numpy.export_state(filled(numpy, rng))
    save_state(tmp_path / "numpy.kv", state)
    save_state(tmp_path / "other.kv", backend.export_state(backend.import_state(state)))
    assert (tmp_path / "other.kv").read_bytes() == (tmp_path / "numpy.kv").read_bytes()


def test_an_empty_cache_can_be_saved(backend: Backend, tmp_path: Path) -> None:
    save_state(tmp_path / "empty.kv", backend.export_state(backend.new_cache()))
    loaded = backend.import_state(load_state(tmp_path / "empty.kv"))
    assert backend.length(loaded) == 0


def test_a_file_that_cannot_be_written_leaves_the_old_one(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, before = load_state(saved), saved.read_bytes()
    with pytest.raises(CacheError, match="expected a place where the cache can be written"):
        save_state(saved.parent / "missing" / "a.kv", state)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CacheError, match="No space left"):
        save_state(saved, state)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"nothing\.kv: expected a cache file, got: .*No such file"):
        load_state(tmp_path / "nothing.kv")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"KIVIKV", b"\x08\x08" * 100):
        (tmp_path / "x.kv").write_bytes(content)
        with pytest.raises(CacheError, match="expected a cache file of onnx_kivi"):
            load_state(tmp_path / "x.kv")


def test_a_truncated_file_is_refused_wherever_it_ends(saved: Path) -> None:
    data = saved.read_bytes()
    for end in (*range(0, 60), len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:end])
        with pytest.raises(CacheError):
            load_state(saved)


def test_a_flipped_bit_is_found_wherever_it_is(saved: Path) -> None:
    data = saved.read_bytes()
    for at in (9, 20, len(data) // 2, len(data) - 40, len(data) - 1):
        saved.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CacheError, match="damaged"):
            load_state(saved)


def test_another_version_is_refused_by_name(saved: Path) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[:6] + struct.pack("<H", 3) + data[8:])
    with pytest.raises(CacheError, match="expected format version 1 or 2, got 3"):
        load_state(saved)


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], tail: bytes | None = None) -> None:
    """Change the header, or the arrays, of a file and give it the checksum that its lie deserves."""
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data, 8)
    header = json.loads(data[16 : 16 + size])
    change(header)
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    arrays = data[16 + size : -32] if tail is None else tail
    body = data[:8] + struct.pack("<Q", len(text)) + text + arrays
    path.write_bytes(body + hashlib.sha256(body).digest())


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """A change that sets the header's value at a path of keys; the last item is the value."""

    def change(header: Any) -> None:
        *keys, last, value = path
        for key in keys:
            header = header[key]
        header[last] = value

    return change


ROW = ("slots", 0, "rows", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("length", 17), "expected 17 tokens in the row"),
        (put("length", -1), "expected a size, got -1"),
        (put("length", 18.0), "expected a size"),
        (put("length", True), "expected a size"),
        (put("step", None), "expected the step's attributes, got none"),
        (put("step", "model_id", ""), "model_id: expected a non-empty string"),
        (put("step", "spec_version", 7), "spec_version: expected 1 or 2, got 7"),
        (put("slots", []), "expected rows that hold the"),
        (put("slots", 0, "rows", []), "bytes of arrays|header that describes"),
        (put("slots", 0, "attributes", "slot", 1), "ascending order"),
        (put("slots", 0, "attributes", "k_bits", 4), "expected"),
        (put("slots", 0, "attributes", "k_bits", 5), "k_bits: expected one of"),
        (put("slots", 0, "attributes", "k_bits", []), r"attribute k_bits: expected int, got \[\]"),
        (put("slots", 0, "attributes", "block_tokens", 1024), "bytes of arrays"),
        (put("slots", 0, "attributes", "sink_length", 1), "sinks"),
        (put("slots", 0, "attributes", "residual_length", 1000), None),
        (put("slots", 1, "attributes", "residual_length", 0), "fewer than"),
        (put("slots", 1, "attributes", "v_bits", 8), None),
        (put(*ROW, "heads", 1), "bytes of arrays|sizes|expected"),
        (put(*ROW, "heads", 2**31), "bytes of arrays"),
        (put(*ROW, "heads", 2**40), "expected a size"),
        (put(*ROW, "heads", "2"), "expected a size"),
        (put(*ROW, "k_head_size", 8), "expected"),
        (put(*ROW, "residual", 2**31), "bytes of arrays"),
        (put(*ROW, "sinks", 0), "expected"),
        (put(*ROW, "blocks", "qqq"), "header that describes a cache"),
        (put(*ROW, "blocks", "qx" * 3), "letters q and d|bytes of arrays"),
        (put(*ROW, "blocks", 3), "header that describes a cache"),
        (put(*ROW, "blocks", "dd" * 400), "bytes of arrays"),
        (put("slots", 0, "attributes", "slot", False), "expected int, got False"),
        (put("slots", 0, "attributes", "slot", 0.5), "expected int, got 0.5"),
        (put("slots", 0, "attributes", "slot", "0"), "says it otherwise"),
        (put("slots", 0, "attributes", "scale", 1.0), "expected float, got 1.0"),
        (put("slots", 0, "attributes", "more", 1), "got an unknown one"),
        (put("more", 1), "says it otherwise"),
        (put(*ROW, "blocks", list("qqqqqq")), "says it otherwise|expected"),
        (put("slots", {}), "expected"),
        (put("slots", 0, None), "header that describes a cache"),
        (lambda header: header.clear(), "header that describes a cache"),
    ],
)
def test_a_header_that_lies_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], None], message: str | None
) -> None:
    rewritten(saved, change)
    if message is None:
        assert load_state(saved).length == 18
        return
    with pytest.raises(CacheError, match=message):
        load_state(saved)


def test_a_header_that_is_no_json_or_ends_beyond_the_file_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for size, text in ((2**60, b"{}"), (4, b"\xff\xfe{}"), (100_000, b"[" * 100_000), (2, b"[]"), (1, b"3")):
        body = data[:8] + struct.pack("<Q", size) + text
        saved.write_bytes(body + hashlib.sha256(body).digest())
        with pytest.raises(CacheError, match="expected a header"):
            load_state(saved)


def test_parameters_that_no_quantizer_writes_are_refused(saved: Path) -> None:
    data = saved.read_bytes()
    (size,) = struct.unpack_from("<Q", data, 8)
    arrays = np.frombuffer(data[16 + size : -32], np.uint8)
    for half in (b"\xff\x7f", b"\x00\x7c", b"\x00\x00"):
        filled_with = np.resize(np.frombuffer(half, np.uint8), arrays.size).tobytes()
        rewritten(saved, lambda _: None, filled_with)
        with pytest.raises(CacheError, match="expected finite parameters and scales"):
            load_state(saved)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_the_header_does_more_than_raise_a_cache_error(data: st.DataObject, saved: Path) -> None:
    path = saved.with_name("changed.kv")
    path.write_bytes(saved.read_bytes())
    backend = get_backend("numpy")

    def change(header: Any) -> None:
        while True:
            keys = list(header) if isinstance(header, dict) else list(range(len(header)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(header[key], dict | list) or not header[key] or data.draw(st.integers(0, 9)) == 0:
                break
            header = header[key]
        small = (
            st.integers(-2, 40) | st.integers() | st.floats() | st.none() | st.booleans() | st.text("qd0", max_size=9)
        )
        header[key] = data.draw(small | st.lists(small, max_size=3) | st.dictionaries(st.text(max_size=3), small))

    rewritten(path, change)
    try:
        handle = backend.import_state(load_state(path))
    except CacheError:
        return
    backend.close(handle)
