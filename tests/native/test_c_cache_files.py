"""Cache files through the C functions: the bytes of Python's, both ways, and nothing that a file says is believed."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from stat import S_IMODE
from typing import Any

import numpy as np
import pytest

from goldens import CACHES, cache_bytes
from onnx_kivi.errors import CacheError
from onnx_kivi.runtime.cache_file import load_state, save_state
from onnx_kivi.runtime.select import get_backend
from onnx_kivi.spec import SdpaAttributes, StepAttributes
from stepping import NOTHING, run, sdpa, tokens

native = pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)

PREFIX = struct.Struct("<6sHQ")
DIGEST_BYTES = 32
LIES: tuple[Any, ...] = (0, 1, -1, 7, 1 << 31, 1 << 32, 1 << 63, 10**30, 0.5, True, None, "x", "", "qq", [], {}, ["x"])


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    """The one that the native backend uses too."""
    loaded = ctypes.CDLL(native.library_path())
    loaded.kivi_load_cache.restype = ctypes.c_int64
    loaded.kivi_last_error.restype = ctypes.c_char_p
    return loaded


def save(library: ctypes.CDLL, handle: int, path: Path) -> None:
    if library.kivi_save_cache(ctypes.c_int64(handle), os.fsencode(path)):
        raise CacheError(library.kivi_last_error().decode())


def put(path: Path, data: bytes) -> None:
    """Write a new file: to cut one that is there takes ext4 milliseconds."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def load(library: ctypes.CDLL, path: Path) -> int:
    handle: int = library.kivi_load_cache(os.fsencode(path))
    if handle < 0:
        raise CacheError(library.kivi_last_error().decode())
    return handle


def contents(rng: np.random.Generator) -> dict[str, int]:
    """Handles of native caches, by what they hold: both versions of the format, numbers and names that need care."""
    backend = get_backend("native")
    nodes = [
        sdpa(0, k_bits=8, v_bits=4, sink_length=2, scale=0.1, softcap=1e-5),
        sdpa(1, k_bits=2, v_bits=32, residual_length=3, scale=-1e16),
        sdpa(2, block_tokens=5, v_group_size=0, scale=123456789.25, softcap=9007199254740994.0),
        sdpa(5, k_bits=4, v_bits=2, kind="cross", scale=5e-324, softcap=1.7976931348623157e308),
    ]

    def filled(nodes: list[SdpaAttributes], count: int = 18, model_id: str = "model") -> int:
        handle = backend.new_cache()
        key, value = tokens(rng, count, batch=2, size=7), tokens(rng, count, batch=2, size=5)
        key[1, 0, 6, 3] = np.inf
        run(backend, handle, nodes, key, value, query=np.zeros((2, 2, 1, 7), np.float32), model_id=model_id)
        assert backend.sealed_tokens(handle) > 0
        return handle

    odd, windowed = filled(nodes), filled([sdpa(0, window=5, evict=1, spec_version=2)], 30)
    backend.crop_rows(odd, [3, 11])
    one_length = backend.new_cache()
    step = StepAttributes(model_id="model", layers=1, one_length='\t"é\U0001f600\x7f\x01', spec_version=2)
    _, ticket = backend.open_step(one_length, -1, step)
    key = tokens(rng, 9)
    backend.attend(ticket, sdpa(0, spec_version=2), key, key, key, NOTHING, NOTHING)
    assert backend.export_state(windowed).slots[0].rows[0].freed > 0
    return {
        "new": backend.new_cache(),
        "version 1": filled(nodes, model_id='a "name" \\ of ~'),
        "rows of two lengths": odd,
        "freed blocks": windowed,
        "a text to escape": one_length,
    }


def test_c_and_python_write_the_same_bytes_and_read_each_others(
    library: ctypes.CDLL, rng: np.random.Generator, tmp_path: Path
) -> None:
    backend, versions = get_backend("native"), set()
    for name, handle in contents(rng).items():
        ours, pythons = tmp_path / "c.kivi", tmp_path / "python.kivi"
        save(library, handle, ours)
        save_state(pythons, backend.export_state(handle))
        assert ours.read_bytes() == pythons.read_bytes(), name
        versions.add(ours.read_bytes()[6])
        save_state(tmp_path / "again.kivi", backend.export_state(load(library, pythons)))
        assert (tmp_path / "again.kivi").read_bytes() == pythons.read_bytes(), name
    assert versions == {1, 2}


def test_a_loaded_cache_goes_on_as_the_saved_one(
    library: ctypes.CDLL, rng: np.random.Generator, tmp_path: Path
) -> None:
    backend, nodes = get_backend("native"), [sdpa(0, k_bits=4), sdpa(1, v_bits=2)]
    handle = backend.new_cache()
    run(backend, handle, nodes, tokens(rng, 18), tokens(rng, 18))
    assert backend.sealed_tokens(handle) > 0
    save(library, handle, tmp_path / "a.kivi")
    loaded = load(library, tmp_path / "a.kivi")
    key = tokens(rng, 9)
    for a, b in zip(run(backend, loaded, nodes, key, key), run(backend, handle, nodes, key, key), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("path", sorted(CACHES.glob("*.kivi")), ids=lambda path: path.stem)
def test_golden_files_are_read_and_written_byte_for_byte(library: ctypes.CDLL, tmp_path: Path, path: Path) -> None:
    save(library, load(library, path), tmp_path / "again.kivi")
    assert (tmp_path / "again.kivi").read_bytes() == path.read_bytes()


@pytest.fixture(scope="module", params=[1, 2], ids=["version 1", "version 2"])
def honest(request: pytest.FixtureRequest) -> bytes:
    """A small file of each version, with codes, a dense block, sinks, a residual and two rows."""
    backend, rng = get_backend("numpy"), np.random.default_rng(0)
    handle = backend.new_cache()
    key, value = tokens(rng, 14, batch=2, heads=1, size=3), tokens(rng, 14, batch=2, heads=1, size=5)
    key[1, 0, 6, 2] = np.inf
    nodes = [sdpa(0, k_bits=8, v_bits=4), sdpa(3, k_bits=2, v_bits=32, residual_length=3)]
    run(backend, handle, nodes, key, value, query=np.zeros((2, 1, 1, 3), np.float32))
    if request.param == 2:
        backend.crop_rows(handle, [14, 9])
    assert backend.sealed_tokens(handle) > 0
    data = cache_bytes(backend, handle)
    assert data[6] == request.param
    return data


def with_checksum(header: bytes, arrays: bytes, version: int, size: int | None = None) -> bytes:
    content = PREFIX.pack(b"KIVIKV", version, len(header) if size is None else size) + header + arrays
    return content + hashlib.sha256(content).digest()


def parts(data: bytes) -> tuple[Any, bytes]:
    """The header, parsed, and the arrays."""
    _, _, size = PREFIX.unpack_from(data)
    return json.loads(data[PREFIX.size :][:size]), data[PREFIX.size + size : -DIGEST_BYTES]


def encoded(header: Any) -> bytes:
    return json.dumps(header, separators=(",", ":"), sort_keys=True).encode()


def test_a_file_that_ends_anywhere_is_refused(library: ctypes.CDLL, honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.kivi"
    for end in range(len(honest)):
        put(path, honest[:end])
        with pytest.raises(CacheError, match=r"x\.kivi: expected"):
            load(library, path)
    header, arrays = parts(honest)
    for end in range(len(arrays)):
        put(path, with_checksum(encoded(header), arrays[:end], honest[6]))
        with pytest.raises(CacheError, match=r"bytes \(bytes of arrays\), got \d+: the file is damaged or truncated"):
            load(library, path)
    put(path, with_checksum(encoded(header), arrays + b"0", honest[6]))
    with pytest.raises(CacheError, match="expected no more bytes of arrays, got 1"):
        load(library, path)


def test_a_flipped_bit_is_found_wherever_it_is(library: ctypes.CDLL, honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.kivi"
    for at in range(len(honest)):
        put(path, honest[:at] + bytes([honest[at] ^ 1 << at % 8]) + honest[at + 1 :])
        with pytest.raises(CacheError):
            load(library, path)


def places(header: Any) -> list[tuple[Any, Any]]:
    """Every (holder, key) of a header."""
    if not isinstance(header, dict | list):
        return []
    keys = list(header) if isinstance(header, dict) else range(len(header))
    return [place for key in keys for place in ((header, key), *places(header[key]))]


def judged(take: Callable[[], int], path: Path) -> bytes | None:
    """What a cache that was taken saves as; None if it was refused."""
    backend = get_backend("native")
    try:
        handle = take()
    except CacheError:
        return None
    save_state(path, backend.export_state(handle))
    backend.close(handle)
    return path.read_bytes()


def test_what_lies_with_a_right_checksum_is_taken_or_refused_as_in_python(
    library: ctypes.CDLL, honest: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    backend, path, again = get_backend("native"), tmp_path / "x.kivi", tmp_path / "again.kivi"
    header, arrays = parts(honest)
    taken = 0
    for holder, key in places(header):
        old = holder[key]
        more = (old + 1, str(old)) if isinstance(old, int) else (old * 2,) if isinstance(old, str | list) else ()
        for lie in (*LIES, *more):
            holder[key] = lie
            put(path, with_checksum(encoded(header), arrays, honest[6]))
            ours = judged(lambda: load(library, path), again)
            assert ours == judged(lambda: backend.import_state(load_state(path)), again), (key, lie)
            assert ours in (None, path.read_bytes()), (key, lie)
            taken += ours is not None
        holder[key] = old
    assert taken > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(b":", b": ", 1), "another text from its byte"),
        (lambda text: text.replace(b'"slots":', b'"slots":[],"slots":'), "another text from its byte"),
        (lambda text: text.replace(b'"kind"', b'"\\u006bind"', 1), "says it otherwise"),
        (lambda text: text.replace(b'"model"', b'"\\ud800"', 1), "another text from its byte"),
        (lambda text: text.replace(b'"model"', b'"\\ud83d\\ude00"', 1), "model_id: expected printable ASCII"),
        (lambda text: text.replace(b'"model"', b'"\\u00', 1), "another text from its byte"),
        (lambda text: text.replace(b'"k_bits":8', b'"k_bits":08', 1), "says it otherwise"),
        (lambda text: text.replace(b'"scale":"1.0"', b'"scale":"1.00"', 1), "says it otherwise"),
        (
            lambda text: text.replace(b'"scale":"1.0"', b'"scale":"inf"', 1),
            "scale: expected float, got 'inf'",
        ),
        (lambda text: text.replace(b'"slot":0,', b"", 1), "attribute slot: expected int, got none"),
        (lambda text: text.replace(b'"slot":0', b'"slot":"0"', 1), "attribute slot: expected int, got another type"),
        (
            lambda text: text.replace(b'"heads":1', b'"heads":0', 1),
            "head sizes from 1 to 65536, got 0",
        ),
        (lambda text: text.replace(b"qq", b"qx", 1), "expected blocks of letters q and d, two for each, got others"),
        (lambda text: text.replace(b"qq", b"q", 1), r"letters q and d, two for each, got \d+ of them"),
        (lambda text: text[:-1], "another text from its byte"),
        (lambda text: text + b" ", "another text from its byte"),
        (lambda _: b"[" * 100_000, "another text from its byte 0 on"),
        (lambda _: b"", "another text from its byte 0 on"),
    ],
)
def test_a_header_in_other_words_is_refused(
    library: ctypes.CDLL, honest: bytes, tmp_path: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    header, arrays = parts(honest)
    assert change(encoded(header)) != encoded(header)
    (tmp_path / "x.kivi").write_bytes(with_checksum(change(encoded(header)), arrays, honest[6]))
    with pytest.raises(CacheError, match=message):
        load(library, tmp_path / "x.kivi")


def test_a_higher_version_than_it_takes_is_refused_as_in_python(library: ctypes.CDLL, tmp_path: Path) -> None:
    header, _ = parts((CACHES / "empty.kivi").read_bytes())
    del header["length"]
    put(tmp_path / "x.kivi", with_checksum(encoded(header | {"lengths": []}), b"", 2))
    for take in (lambda path: load(library, path), load_state):
        with pytest.raises(CacheError, match="says it otherwise"):
            take(tmp_path / "x.kivi")


def test_a_prefix_that_is_not_ours_is_refused(library: ctypes.CDLL, honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.kivi"
    claims = {
        "expected a cache file of onnx_kivi, got something else": b"PK" + honest[2:],
        "expected format version 1 or 2, got 3; load it with the newer": honest[:6] + b"\3" + honest[7:],
        "expected format version 1 or 2, got 0": honest[:6] + b"\0" + honest[7:],
        "expected a header of at most 67108864 bytes, got 1152921504606846976": with_checksum(b"", b"", 1, 1 << 60),
        r"expected 1000000 more bytes \(a header\)": with_checksum(b"", b"", 1, 1_000_000),
    }
    for message, data in claims.items():
        put(path, data)
        with pytest.raises(CacheError, match=message):
            load(library, path)


def test_arrays_that_no_quantizer_writes_are_refused(library: ctypes.CDLL, honest: bytes, tmp_path: Path) -> None:
    header, arrays = parts(honest)
    (tmp_path / "x.kivi").write_bytes(with_checksum(encoded(header), b"\xff" * len(arrays), honest[6]))
    with pytest.raises(CacheError, match="expected finite parameters and scales"):
        load(library, tmp_path / "x.kivi")


@pytest.mark.parametrize(
    ("make", "got"),
    [
        (os.mkfifo, "a FIFO"),
        (os.mkdir, "a folder"),
        (lambda path: path.symlink_to("nothing"), "a symbolic link"),
        (lambda path: path.symlink_to("/dev/null"), "a symbolic link"),
    ],
)
def test_only_regular_files_are_replaced_and_read(
    library: ctypes.CDLL, tmp_path: Path, make: Callable[[Path], object], got: str
) -> None:
    path = tmp_path / "a.kivi"
    make(path)
    before = path.lstat()
    with pytest.raises(CacheError, match=f"got: expected a regular file, or a name not in use, got {got}"):
        save(library, library.kivi_new_cache(), path)
    assert (path.lstat().st_mode, path.lstat().st_ino) == (before.st_mode, before.st_ino)
    with pytest.raises(CacheError, match=r"expected a cache file, got: (expected a regular file|No such file)"):
        load(library, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_old_file(library: ctypes.CDLL, rng: np.random.Generator, tmp_path: Path) -> None:
    backend, path = get_backend("native"), tmp_path / "a.kivi"
    handle = backend.new_cache()
    save(library, handle, path)
    before = path.read_bytes()
    run(backend, handle, [sdpa(0)], tokens(rng, 900), tokens(rng, 900))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(CacheError, match="expected a place where the cache can be written, got: File too"):
            save(library, handle, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    with pytest.raises(CacheError, match="expected an existing folder, got"):
        save(library, handle, tmp_path / "absent" / "a.kivi")
    with pytest.raises(CacheError, match="expected an open handle"):
        save(library, 1, path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_sweeps_what_a_killed_writer_left_and_no_more(library: ctypes.CDLL, tmp_path: Path) -> None:
    path, left, living, other = (
        tmp_path / name for name in ("a", ".a.0123.kivi-part", ".a.4567.kivi-part", ".b.0123.kivi-part")
    )
    for file in (left, living, other):
        file.touch()
    umask = os.umask(0o027)
    try:
        with living.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            save(library, library.kivi_new_cache(), path)
    finally:
        os.umask(umask)
    assert sorted(tmp_path.iterdir()) == sorted([path, living, other])
    assert S_IMODE(path.stat().st_mode) == 0o640
