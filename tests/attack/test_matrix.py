"""Bad input of every kind on each host and backend: the class and words of `hostile`, never a crash, a hang or silence.

The cases run in worker processes. By default every QUICK-th of the large groups is tried, with `-m slow` all of them.
"""

from __future__ import annotations

import functools
import importlib
import re

import pytest

from hostile.case import OURS, Case
from hostile.worker import Outcome, outcomes
from onnx_kivi.runtime.hosts import describe

HOSTS = (("native", "native"), ("python", "native"), ("python", "numpy"))
GROUPS = {"runs": 1, "tensors": 1, "settings": 1, "models": 9, "cache_files": 11}  # which share is quick


@functools.cache
def cases(group: str) -> dict[str, Case]:
    return {case.name: case for case in importlib.import_module(f"hostile.{group}").CASES}


def broken(group: str, outcome: Outcome) -> bool:
    """Whether a case ended in another way than its table says."""
    case = cases(group).get(outcome.case)
    lines = outcome.kind in OURS and "\n" in outcome.words
    return case is None or outcome.kind not in case.raises or lines or not re.search(case.words, outcome.words, re.S)


def all_refused(group: str, host: str, backend: str, step: int) -> None:
    found = outcomes(group, host, backend, (0, step))
    assert len(found) == len(range(0, len(cases(group)), step))
    assert [outcome for outcome in found if broken(group, outcome)] == []


@pytest.mark.parametrize(("host", "backend"), HOSTS)
@pytest.mark.parametrize("group", GROUPS)
def test_bad_input_is_refused_in_its_own_words(group: str, host: str, backend: str) -> None:
    if host not in describe()["hosts"] or backend not in describe()["backends"]:
        pytest.skip(f"no host {host} with backend {backend} here")
    if group == "settings" and host == "python":
        pytest.skip("settings are the same on every host")
    all_refused(group, host, backend, GROUPS[group])


@pytest.mark.slow
@pytest.mark.parametrize(("host", "backend"), HOSTS)
@pytest.mark.parametrize("group", [group for group, share in GROUPS.items() if share > 1])
def test_all_bad_input_is_refused_in_its_own_words(group: str, host: str, backend: str) -> None:
    if host not in describe()["hosts"] or backend not in describe()["backends"]:
        pytest.skip(f"no host {host} with backend {backend} here")
    all_refused(group, host, backend, 1)


def test_a_case_that_crashes_or_hangs_or_is_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostile.worker.SECONDS_A_CASE", 3)
    found = outcomes("selftest", "python", "numpy")
    assert [(outcome.case, outcome.kind) for outcome in found] == [
        ("crashes", "crashed"),
        ("hangs", "hung"),
        ("says nothing", "silent"),
        ("drops tokens", "changed"),
        ("refuses", "CacheError"),
    ]
