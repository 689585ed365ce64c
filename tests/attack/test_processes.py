"""What happens around a process: forks, spawns, exits with caches open, kills in the midst of a save, other locales."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import onnx_kivi as kivi
from onnx_kivi.runtime.cache_file import load_state
from onnx_kivi.runtime.hosts import describe

TIME_LIMIT = 60
PAIRS = [
    ("native", "native"),
    ("python", "numpy"),
    pytest.param("python", "native", marks=pytest.mark.slow),
]
PREAMBLE = """
    import os, sys, threading
    import numpy as np
    import onnx_kivi as kivi

    def feeds(past, count):
        at, seen = np.arange(past, past + count)[None], np.ones((1, past + count), np.int64)
        return {"input_ids": at % 250, "attention_mask": seen, "position_ids": at}

    def opened():
        session = kivi.Session(sys.argv[1], host=sys.argv[2], backend=sys.argv[3])
        session.run(["logits"], feeds(0, 60))
        assert session.cache.sealed_tokens > 0
        return session
"""

pytestmark = pytest.mark.parametrize(("host", "backend"), PAIRS)


def command(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(PREAMBLE) + textwrap.dedent(code), *map(str, arguments)]


def run(code: str, model: Path, host: str, backend: str, more: dict[str, str] | None = None) -> str:
    """The output of a child process that must end well; skips a host that is not here."""
    if host not in describe()["hosts"]:
        pytest.skip(f"no host {host} here")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | (more or {})
    child = subprocess.run(
        command(code, model, host, backend),
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
        env=environment,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout


EXITS = {
    "the end": "session = opened()",
    "sys.exit": "session = opened(); sys.exit(0)",
    "os._exit": "session = opened(); os._exit(0)",
    "an exit in a thread": "session = opened(); threading.Thread(target=lambda: os._exit(0)).start()",
    "a daemon that runs on": """
        session = opened()
        def on():
            while True:
                session.run(["logits"], feeds(0, 60) | {"past_length": np.array([0])})
        threading.Thread(target=on, daemon=True).start()
        import time; time.sleep(0.3); os._exit(0)
    """,
    "a cache in a cycle": "session = opened(); session.me = session; cache = session.cache.fork(); cache.me = cache",
    "a cache that is global": "import builtins; session = opened(); builtins.kept = session.cache.fork()",
}


@pytest.mark.parametrize("way", EXITS)
def test_a_process_ends_with_caches_open(rewritten: Callable[[int], Path], way: str, host: str, backend: str) -> None:
    run(EXITS[way], rewritten(8), host, backend)


def test_a_forked_child_goes_on_with_a_copy_of_its_own(
    rewritten: Callable[[int], Path], host: str, backend: str
) -> None:
    """The child has no threads of onnxruntime's: the store itself must serve it, and leave the parent's alone."""
    code = """
        session = opened()
        child = os.fork()
        if not child:
            cache = session.cache.fork()
            cache.crop(50); cache.reorder([0, 0]); cache.save(sys.argv[1] + ".child")
            session.cache.reset()
            os._exit(0 if (cache.length, session.cache.length) == (50, 0) else 3)
        _, status = os.waitpid(child, 0)
        session.run(["logits"], feeds(60, 1))
        print(status, session.cache.length, session.load_cache(sys.argv[1] + ".child").length)
    """
    assert run(code, rewritten(8), host, backend) == "0 61 50\n"


def test_a_spawned_child_has_caches_of_its_own(rewritten: Callable[[int], Path], host: str, backend: str) -> None:
    code = """
        import subprocess
        session = opened()
        session.cache.save(sys.argv[1] + ".spawned")
        child = "import sys; import onnx_kivi as kivi; _, model, host, backend = sys.argv;"
        child += "session = kivi.Session(model, host=host, backend=backend);"
        child += "print(session.load_cache(model + '.spawned').length, session.cache.length, flush=True)"
        subprocess.run([sys.executable, "-c", child, *sys.argv[1:]], check=True)
    """
    assert run(code, rewritten(8), host, backend) == "60 0\n"


def test_a_locale_with_a_decimal_comma_changes_nothing(
    rewritten: Callable[[int], Path], tmp_path: Path, host: str, backend: str
) -> None:
    if shutil.which("localedef") is None:
        pytest.skip("no localedef here, which makes the locale")
    made = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "de_DE.UTF-8"], capture_output=True, check=False
    )
    if not (tmp_path / "de_DE.UTF-8").exists():
        pytest.skip(f"localedef can't make de_DE: {made.stderr.decode()[:200]}")
    code = """
        import locale
        def logits(session):
            return session.run(["logits"], feeds(session.cache.length, 2))[0].tobytes()
        expected = logits(opened())
        locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
        session = opened()
        print(locale.str(0.5), logits(session) == expected)
        session.cache.save(sys.argv[1] + ".de")
        print(session.load_cache(sys.argv[1] + ".de").length)
    """
    said = run(code, rewritten(8), host, backend, {"LOCPATH": str(tmp_path)})
    assert said == "0,5 True\n62\n"


def test_a_save_that_is_killed_leaves_a_whole_file(
    rewritten: Callable[[int], Path], tmp_path: Path, host: str, backend: str
) -> None:
    """Killed at any moment, five times: the file is always one that loads, and the last save clears the rest away."""
    if host not in describe()["hosts"]:
        pytest.skip(f"no host {host} here")
    code = """
        session = opened()
        session.cache.save(sys.argv[4])
        print("saving", flush=True)
        while True:
            session.cache.save(sys.argv[4])
    """
    target = tmp_path / "cache.kv"
    for i in range(5):
        with subprocess.Popen(
            command(code, rewritten(8), host, backend, target),
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == b"saving\n"
            time.sleep(0.003 * i)
            child.send_signal(signal.SIGKILL)
        assert load_state(target).length == 60
    session = kivi.Session(rewritten(8), host=host, backend=backend)
    session.load_cache(target).save(target)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.kv"]
