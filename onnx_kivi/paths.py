"""Where a model lies (a file, or a folder that holds model.onnx), where this package does, and which files are read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import UnsupportedModelError

MODEL_FILE = "model.onnx"

KINDS = {
    stat.S_IFREG: "a regular file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def model_path(model: str | os.PathLike[str]) -> Path:
    """The .onnx file that `model` names: itself, or model.onnx inside it if it is a folder.

    Raises UnsupportedModelError as `tellable` does.
    """
    path = tellable(model)
    return path / MODEL_FILE if path.is_dir() else path


def tellable(name: str | os.PathLike[str]) -> Path:
    """A path. Raises UnsupportedModelError for one that onnxruntime can't be told: with a NUL, or not in UTF-8."""
    path = Path(name)
    if "\0" in str(path) or not is_utf8(str(path)):
        raise UnsupportedModelError(f"{str(path)!a}: expected a path in UTF-8 and without NUL, as onnxruntime does")
    return path


def source_tree() -> Path | None:
    """The root of the source tree, if the package was imported from there; None for an installed one."""
    root = Path(__file__).parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "custom_ops").is_dir() else None


def is_utf8(text: str) -> bool:
    """Whether the text can be written in UTF-8; what the system gave as other bytes can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def open_regular(path: Path) -> BinaryIO:
    """The file, open for reading. Raises OSError, also for what would never end or never begin: a FIFO, a device."""
    try:
        mode = path.stat().st_mode
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), ascii(str(path))) from None
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"expected a regular file, got {kind(mode)}", str(path))
    return path.open("rb")


def read_text(path: Path) -> str:
    """The text of a file. Raises OSError as `open_regular` does, and for what is not UTF-8."""
    with open_regular(path) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise OSError(
                errno.EILSEQ, f"expected text in UTF-8, got other bytes ({error.reason})", str(path)
            ) from None


def kind(mode: int) -> str:
    """What a file of this mode is, in words."""
    return KINDS.get(stat.S_IFMT(mode), "something unknown")
