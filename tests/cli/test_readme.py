"""The README's examples run as they stand, on a tiny decoder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"
SELF_CONTAINED = 4


def test_the_examples_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    shutil.copy(tiny, tmp_path / "model.onnx")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in examples[:SELF_CONTAINED]:
        exec(compile(example, README.name, "exec"), names)
    assert names["draft"].length == 4
    assert names["rows"].lengths == (3, 1)
    assert (tmp_path / "prompt.kivi").exists()
