"""What is written gets its name when it is complete: made beside its target, synced, then renamed.

A target is a regular file or a name not in use; anything else is refused, symbolic links too, so that what they point
to (a blob that others share, say) is never replaced. A writer holds a lock on what it makes. What a killed writer
left is locked by nobody, and goes when the same name is written next.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

from .errors import ConfigError
from .paths import kind

SUFFIX = ".kivi-part"


def check_target(target: Path) -> None:
    """Raise ConfigError unless `target` is a regular file or a name not in use, in a folder that exists."""
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        if not target.parent.is_dir():
            raise ConfigError(f"{target}: expected an existing folder, got {target.parent}; create it first") from None
        return
    except ValueError as error:
        raise ConfigError(f"{str(target)!a}: expected the name of a file, got one with {error}") from None
    if not S_ISREG(mode):
        raise ConfigError(f"{target}: expected a regular file, or a name not in use, got {kind(mode)}")


@contextmanager
def staged(target: Path) -> Iterator[BinaryIO]:
    """A file to write. It becomes `target` if the block succeeds, and goes away if not.

    Its mode is what the umask says. Raises ConfigError as `check_target` does, and OSError.
    """
    check_target(target)
    with _claimed(target, lambda path: path.touch(exist_ok=False)) as path, path.open("r+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        path.replace(target)
        _sync(target.parent)


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A folder of the caller's own beside `target`, gone when the block ends. Raises OSError."""
    with _claimed(target, lambda path: path.mkdir(0o700)) as path:
        yield path


def check_folder_target(target: Path) -> None:
    """Raise ConfigError unless `target` is an empty folder or a name not in use, in a folder that exists."""
    if not os.path.lexists(target):
        check_target(target)
        return
    mode = target.lstat().st_mode
    if not S_ISDIR(mode):
        raise ConfigError(f"{target}: expected an empty folder, or a name not in use, got {kind(mode)}")
    if any(target.iterdir()):
        raise ConfigError(f"{target}: expected an empty folder, or a name not in use, got one with files; delete it")


def publish(folder: Path, target: Path) -> None:
    """Give a folder that is complete its name, as `check_folder_target` allows. Raises OSError."""
    for held, _, _ in os.walk(folder):
        _sync(Path(held))
    folder.replace(target)
    _sync(target.parent)


def place(source: Path, target: Path, *, link: bool) -> None:
    """Have the content of a file at `target` too, its folder made; with `link` by hard link where that can be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            link = False
    if not link:
        with staged(target) as out:
            shutil.copyfile(source, out.name)


@contextmanager
def _claimed(target: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A locked new path beside `target`, removed at the end if it is still there. An OSError says for which target."""
    _sweep(target)
    path, lock = _make_locked(target, make)
    try:
        yield path
    except OSError as error:
        if error.errno and error.filename is None:
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    finally:
        _remove(path)
        os.close(lock)


def _make_locked(target: Path, make: Callable[[Path], None]) -> tuple[Path, int]:
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(4)}{SUFFIX}")
        make(path)
        with suppress(FileNotFoundError):  # another writer may sweep it away before it is locked
            lock = os.open(path, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nothing is swept there
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _sweep(target: Path) -> None:
    """Remove what killed writers of this name left."""
    for left in target.parent.glob(f".{escape(target.name)}.*{SUFFIX}"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(left)
            finally:
                os.close(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Have the new name on the disk, where folders can be synced."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
