"""Where onnxruntime's official C API header can be had: ONNXRUNTIME_INCLUDE_DIR, or Debian trixie's package.

The package is downloaded without being installed, from where this machine's own apt configuration says Debian is,
with the suite's name changed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

PACKAGE = "libonnxruntime-dev"
SUITE = "trixie"
HEADER = "onnxruntime_c_api.h"
OLDER_SUITES = re.compile(r"\b(buster|bullseye|bookworm|stable|oldstable)\b")


class HeadersUnavailableError(Exception):
    """The header can't be had here; the message says why."""


def include_directory(scratch: Path) -> Path:
    """Folder of the official header, downloaded into `scratch` if need be. Raises HeadersUnavailableError."""
    given = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    if given:
        found = next(Path(given).rglob(HEADER), None)
        if found is None:
            raise HeadersUnavailableError(f"ONNXRUNTIME_INCLUDE_DIR={given} holds no {HEADER}")
        return found.parent
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise HeadersUnavailableError("no ONNXRUNTIME_INCLUDE_DIR, and no apt-get to download the header with")
    parts = scratch / "sources"
    for folder in (parts, scratch / "lists" / "partial", scratch / "cache" / "archives" / "partial", scratch / "state"):
        folder.mkdir(parents=True)
    (scratch / "state" / "status").touch()
    _write_sources(parts)
    options = {
        "Dir::Etc::SourceList": "/dev/null",
        "Dir::Etc::SourceParts": parts,
        "Dir::State": scratch / "state",
        "Dir::State::Lists": scratch / "lists",
        "Dir::State::status": scratch / "state" / "status",
        "Dir::Cache": scratch / "cache",
        "Acquire::Languages": "none",
    }
    apt = ["apt-get", "-q", *(f"-o{name}={value}" for name, value in options.items())]
    _run([*apt, "update"], scratch)
    _run([*apt, "download", PACKAGE], scratch)
    package = next(scratch.glob(f"{PACKAGE}*.deb"))
    _run(["dpkg-deb", "-x", str(package), str(scratch / "root")], scratch)
    return next((scratch / "root").rglob(HEADER)).parent


def _write_sources(parts: Path) -> None:
    """The machine's Debian sources for the other suite, updates and security left out."""
    lines = []
    for file in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
        if file.suffix not in (".list", ".sources") or not file.is_file():
            continue
        for stanza in file.read_text().split("\n\n"):
            if OLDER_SUITES.search(stanza) and "security" not in stanza:
                renamed = re.sub(rf"{OLDER_SUITES.pattern}(-updates|-backports)?", SUITE, stanza)
                suffix = ".list" if file.suffix == ".list" else ".sources"
                lines.append((suffix, renamed.replace(f"{SUITE} {SUITE}", SUITE)))
    if not lines:
        raise HeadersUnavailableError("this machine's apt configuration names no Debian suite")
    for i, (suffix, text) in enumerate(lines):
        (parts / f"{i}{suffix}").write_text(text + "\n")


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise HeadersUnavailableError(f"{' '.join(command[:1] + command[-2:])}: {done.stderr.strip()[-300:]}")
