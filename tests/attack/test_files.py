"""Files: only regular ones are read and replaced, weights are never overwritten, killed writers leave no litter."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from stat import S_IFMT, S_IMODE

import numpy as np
import onnx
import pytest

import onnx_kivi as kivi
from graphs import decoder
from onnx_kivi import staging
from onnx_kivi.cli.parser import main
from onnx_kivi.graph import files
from onnx_kivi.runtime.backend import CacheState
from onnx_kivi.runtime.cache_file import load_state, save_state
from refusals import refusal

EMPTY = CacheState(None, (), ())
SPARSE_BYTES = 1 << 40


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the system allows short addresses only
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def folder(path: Path) -> None:
    path.mkdir()


def link_to_a_file(path: Path) -> None:
    path.with_name("target").write_bytes(b"precious")
    path.symlink_to("target")


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/null")


OTHER_THINGS = (fifo, unix_socket, folder, link_to_a_file, link_to_nothing, link_to_a_device)
WRITERS: dict[str, Callable[[Path], object]] = {
    "model": lambda path: kivi.save(decoder(), path),
    "cache": lambda path: save_state(path, EMPTY),
}


@pytest.mark.parametrize("make", OTHER_THINGS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_only_regular_files_are_replaced(
    tmp_path: Path, make: Callable[[Path], None], write: Callable[[Path], object]
) -> None:
    path = tmp_path / "out"
    make(path)
    before = path.lstat()
    with pytest.raises(kivi.KiviError, match="expected a regular file, or a name not in use, got a "):
        write(path)
    after = path.lstat()
    assert (S_IFMT(after.st_mode), after.st_ino) == (S_IFMT(before.st_mode), before.st_ino)
    if (tmp_path / "target").exists():
        assert (tmp_path / "target").read_bytes() == b"precious"


def test_a_device_is_no_output(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    assert main(["rewrite", str(tiny), "-o", "/dev/null", "--no-verify"]) == 2
    assert "got a device" in capsys.readouterr().err
    assert not Path("/dev/null").is_file()


@pytest.fixture
def endless(tmp_path: Path) -> dict[str, Path]:
    """What never ends, never begins, or is far too long, by name."""
    fifo(tmp_path / "fifo")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(SPARSE_BYTES)
    return {name: tmp_path / name for name in ("fifo", "sparse")} | {"device": Path("/dev/zero")}


@pytest.mark.parametrize("name", ["fifo", "sparse", "device"])
def test_what_never_ends_is_no_input(endless: dict[str, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = endless[name]
    readers: list[Callable[[], object]] = [
        lambda: kivi.load(path),
        lambda: kivi.inspect(path),
        lambda: kivi.Session(path),
        lambda: load_state(path),
    ]
    for read in readers:
        with pytest.raises(kivi.KiviError, match="expected a"):
            read()
    for command in (["inspect", path], ["rewrite", path, "-o", path.with_name("o.onnx")], ["verify", path, path]):
        assert main([str(word) for word in command]) == 2
        refusal(capsys.readouterr().err)


def test_a_tokenizer_that_never_ends_is_refused(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fifo(tmp_path / "tokenizer.json")
    assert main(["generate", str(tiny), "--tokenizer", str(tmp_path), "--prompt", "a"]) == 2
    assert "a FIFO" in capsys.readouterr().err


@pytest.fixture
def umask() -> Iterator[Callable[[int], None]]:
    before = os.umask(0)
    os.umask(before)
    yield lambda mask: void(os.umask(mask))
    os.umask(before)


def void(_: object) -> None:
    pass


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_has_the_mode_that_the_umask_says(
    tmp_path: Path, umask: Callable[[int], None], write: Callable[[Path], object], mask: int, mode: int
) -> None:
    umask(mask)
    write(tmp_path / "out")
    assert S_IMODE((tmp_path / "out").stat().st_mode) == mode


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from onnx_kivi.staging import staged, staging_folder
    with staging_folder(Path(sys.argv[1])) as folder, staged(Path(sys.argv[1])) as out:
        (folder / "inner").write_bytes(b"half")
        out.write(b"half")
        out.flush()
        print("writing", flush=True)
        if sys.argv[2] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        sys.stdin.read()
"""


def writer(target: Path, what: str) -> subprocess.Popen[bytes]:
    """A process in the midst of writing `target`."""
    code = textwrap.dedent(KILLED)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target), what],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    return process


def die(target: Path) -> None:
    """Leave what a writer leaves that is killed."""
    with writer(target, "die") as process:
        assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_killed_writers_left_goes_and_what_living_ones_write_stays(
    tmp_path: Path, write: Callable[[Path], object]
) -> None:
    target = tmp_path / "out"
    for _ in range(3):
        die(target)
    assert any(tmp_path.iterdir())
    living = writer(target, "wait")
    held = {path.name for path in tmp_path.iterdir()}
    write(target)
    assert {path.name for path in tmp_path.iterdir()} == held | {"out"}
    assert len(held) == 2
    living.communicate()
    assert living.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert target.read_bytes() == b"half"


def test_litter_of_another_name_is_left_alone(tmp_path: Path) -> None:
    die(tmp_path / "other")
    with staging.staged(tmp_path / "out") as out:
        out.write(b"whole")
    assert len(list(tmp_path.glob(".other.*"))) == 2


def large(value: float) -> onnx.ModelProto:
    model = decoder(mask="m1 = Add(scaled, big) masked = Add(m1, mask)")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full((2, 4, 16, 64), value, np.float32), "big"))
    return model


def test_weights_that_lie_there_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 1 << 12)
    out = tmp_path / "out.onnx"
    written = {kivi.save(large(value), out)[0].name: value for value in (1.0, 2.0, 3.0, 2.0)}
    assert written == {"out.onnx.data": 1.0, "out-out.onnx.data": 2.0, "out-2-out.onnx.data": 3.0}
    for name, value in written.items():
        assert np.fromfile(tmp_path / name, np.float32, 4)[0] == value
    tensor = next(t for t in onnx.load(out).graph.initializer if t.name == "big")
    assert onnx.numpy_helper.to_array(tensor).flat[0] == 2.0


def test_weights_of_the_same_size_and_time_are_not_taken_for_the_same(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        onnx.save(large(value), tmp_path / name / "model.onnx", save_as_external_data=True, location="w.bin")
        os.utime(tmp_path / name / "w.bin", (1, 1))
    (kept,) = kivi.save(kivi.load(tmp_path / "a"), tmp_path / "b" / "other.onnx")
    assert kept.name == "other-w.bin"
    assert np.fromfile(tmp_path / "b" / "w.bin", np.float32)[-1] == 2.0


def test_a_save_that_fails_leaves_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", 1 << 12)

    def full(*_: object, **__: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "bring", full)
    with pytest.raises(OSError, match="No space"):
        kivi.save(large(1.0), tmp_path / "out.onnx")
    assert not any(tmp_path.iterdir())


@pytest.fixture
def external(tmp_path: Path) -> Path:
    """A model with weights beside it, in a folder of its own; a secret lies outside."""
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    onnx.save(large(1.0), tmp_path / "model" / "model.onnx", save_as_external_data=True, location="w.bin")
    return tmp_path / "model" / "model.onnx"


@pytest.mark.parametrize("command", ["inspect", "rewrite", "verify"])
@pytest.mark.parametrize("target", ["../secret", "/proc/self/environ", "w.bin"], ids=["up", "system", "loop"])
def test_weights_that_are_links_out_of_the_folder_are_refused(
    external: Path, target: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    external.with_name("w.bin").unlink()
    external.with_name("w.bin").symlink_to(target)
    more = {"inspect": [], "rewrite": ["-o", f"{external.parent}/out.onnx", "--no-verify"], "verify": [str(external)]}
    assert main([command, str(external), *more[command]]) == 2
    error = refusal(capsys.readouterr().err)
    assert "external" in error or "weights" in error
    assert sorted(p.name for p in external.parent.iterdir()) == ["model.onnx", "w.bin"]


def test_a_folder_that_is_a_link_out_is_refused(external: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (external.parent / "inside").symlink_to(tmp_path / "elsewhere")
    external.with_name("w.bin").rename(tmp_path / "elsewhere" / "w.bin")
    model = onnx.load(external, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "inside/w.bin" if entry.key == "location" else entry.value
    onnx.save(model, external)
    with pytest.raises(kivi.UnsupportedModelError, match="a link to"):
        kivi.load(external)


def test_a_hubs_cache_of_linked_blobs_is_read(external: Path, tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    for name in ("model.onnx", "w.bin"):
        (tmp_path / "snapshot" / name).symlink_to(external.with_name(name))
    out = tmp_path / "out.onnx"
    kivi.save(kivi.rewrite(tmp_path / "snapshot")[0], out)
    assert (tmp_path / "w.bin").read_bytes() == external.with_name("w.bin").read_bytes()
    kivi.Session(out)


def test_a_model_cannot_name_the_folder_it_came_from(external: Path, tmp_path: Path) -> None:
    model = onnx.load(external, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.external_data:
            tensor.external_data.add(key="basepath", value=str(tmp_path))
            tensor.external_data[0].value = "secret"
    (tmp_path / "out").mkdir()
    kivi.save(model, tmp_path / "out" / "out.onnx")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["out.onnx"]


@pytest.mark.parametrize("path", ["a\0b", "a\udcff.onnx"], ids=["NUL", "no UTF-8"])
def test_paths_that_are_no_text_are_refused(tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    bad = str(tmp_path / path)
    for command in (["inspect", bad], ["verify", bad, bad], ["rewrite", bad, "-o", "o.onnx"]):
        assert main(command) == 2
        assert "expected a path in UTF-8 and without NUL" in capsys.readouterr().err
    for write in (lambda: kivi.Session(bad), lambda: kivi.load(bad)):
        with pytest.raises(kivi.UnsupportedModelError, match="without NUL"):
            write()


def test_a_path_with_nul_is_no_output(tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = str(tmp_path / "a\0b")
    assert main(["rewrite", str(tiny), "-o", bad]) == 2
    refusal(capsys.readouterr().err)
    for write in WRITERS.values():
        with pytest.raises(kivi.KiviError, match="expected"):
            write(Path(bad))
    with pytest.raises(kivi.CacheError, match="expected a cache file"):
        load_state(bad)
