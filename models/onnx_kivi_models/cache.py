"""A folder of built files in the user's cache, complete and intact or absent.

Contract: what `make` writes appears under its final name only when all of it is there, with a manifest of SHA-256
hashes; a folder is reused only if its recipe is the one asked for and every hash agrees, and is built again otherwise.
Concurrent builders each work in a folder of their own, and the first to finish wins.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from onnx_kivi.errors import KiviError
from onnx_kivi.progress import Progress

ENVIRONMENT = "ONNX_KIVI_CACHE"
MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """Where built models go: ONNX_KIVI_CACHE if set, else `onnx_kivi` in the user's cache folder of this platform."""
    if override := os.environ.get(ENVIRONMENT):
        return Path(override).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "onnx_kivi"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe(*parts: Any) -> str:
    """A hash of what a build depends on: files (their bytes) and values (their repr)."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
    return digest.hexdigest()


def cached(name: str, recipe: str, make: Callable[[Path], None], progress: Progress, root: Path | None = None) -> Path:
    """The folder `name` under `root` (default: `cache_folder()`), reused if intact, else filled by `make(folder)`.

    Raises KiviError where the folder can't be written; an error from `make` passes through and leaves nothing behind.
    """
    root = root or cache_folder()
    final = root / name
    if _intact(final, recipe, progress):
        return final
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError as error:
        raise KiviError(f"{root}: not writable ({error}); set {ENVIRONMENT} to another folder") from error
    try:
        built = scratch / "built"
        built.mkdir()
        make(built)
        progress("checking", 0.0)
        hashes = {path.name: sha256(path) for path in sorted(built.iterdir())}
        (built / MANIFEST).write_text(json.dumps({"recipe": recipe, "sha256": hashes}, indent=1) + "\n")
        _publish(built, final, scratch / "replaced", recipe, progress)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _intact(folder: Path, recipe: str, progress: Progress) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["recipe"] != recipe:
            return False
        progress("checking", 0.0)
        return all(sha256(folder / name) == expected for name, expected in manifest["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _publish(built: Path, final: Path, replaced: Path, recipe: str, progress: Progress) -> None:
    """Rename `built` to `final`; a rename on a folder that exists fails, so whoever comes second looks at it first."""
    try:
        built.rename(final)
    except OSError:
        if _intact(final, recipe, progress):
            return
        with suppress(FileNotFoundError):
            final.rename(replaced)
        try:
            built.rename(final)
        except OSError as error:
            if not _intact(final, recipe, progress):
                raise KiviError(f"{final}: damaged and not replaceable ({error}); delete it") from error
