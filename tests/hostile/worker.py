"""Tries cases in a process of its own, so that one that crashes or hangs is told from the others by its name.

The worker (`python -m hostile.worker GROUP HOST BACKEND BEGIN`) says on stdout what it begins and how it ended, a JSON
object a line; `outcomes` starts it, gives each case its time, and starts it again behind a case that took it down.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

SECONDS_A_CASE = 30
SECONDS_TO_START = 60


@dataclass(frozen=True)
class Outcome:
    """How a case ended: the class that it raised and the message, or "silent", "changed", "crashed", "hung"."""

    case: str
    kind: str
    words: str


def outcomes(group: str, host: str, backend: str, share: tuple[int, int] = (0, 1)) -> list[Outcome]:
    """Of every case of a group; share (i, n): of every n-th only, from the i-th on."""
    done: list[Outcome] = []
    begin, step = share
    while True:
        last = _follow(group, host, backend, begin, step, done)
        if last is None:
            return done
        begin = last + step


def _follow(group: str, host: str, backend: str, begin: int, step: int, done: list[Outcome]) -> int | None:
    """Run a worker from case `begin` on; the index of the case that took it down, None if it came to the end."""
    command = [sys.executable, "-m", "hostile.worker", group, host, backend, str(begin), str(step)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        lines: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        index, name, limit = begin, "start", SECONDS_TO_START
        while True:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                process.kill()
                done.append(Outcome(name, "hung", f"longer than {limit} s"))
                return index
            if not line:
                if process.wait() == 0:
                    return None
                errors.seek(0)
                done.append(Outcome(name, "crashed", f"exit {process.returncode}: {errors.read()[-2000:].decode()}"))
                return index
            said = json.loads(line)
            limit = SECONDS_A_CASE
            if "kind" in said:
                done.append(Outcome(name, said["kind"], said["words"]))
            else:
                index, name = said["index"], said["case"]


def _read(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put("")


def _work(group: str, host: str, backend: str, begin: int, step: int) -> None:
    from hostile.case import Scene

    out, sys.stdout = sys.stdout, sys.stderr
    logging.getLogger("onnx_kivi").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        scene = Scene(Path(folder), host, backend)
        scene.refill()
        attacks = list(importlib.import_module(f"hostile.{group}").CASES)
        for index in range(begin, len(attacks), step):
            case = attacks[index]
            print(json.dumps({"index": index, "case": case.name}), file=out, flush=True)
            print(json.dumps(_tried(scene, case.act)), file=out, flush=True)


def _tried(scene: object, act: object) -> dict[str, str]:
    """The error of an act; "changed" where it left the cache another than it was, or unusable."""
    from hostile.case import HELD, Scene

    assert isinstance(scene, Scene)
    assert callable(act)
    cache = scene.cache
    try:
        got = act(scene)
    except Exception as error:
        said = {"kind": type(error).__name__, "words": str(error)}
    else:
        said = {"kind": "silent", "words": repr(got)[:200]}
    try:
        if cache.length != HELD:
            raise AssertionError(f"{cache.length} tokens of {HELD} are left")
        scene.run()
        cache.crop(HELD)
    except Exception as error:
        scene.refill()
        return {"kind": "changed", "words": f"{type(error).__name__}: {error}, after {said}"}
    return said


if __name__ == "__main__":
    _work(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
