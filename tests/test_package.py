"""The package as a whole: its list of names, and what importing it brings in."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import onnx_kivi as kivi

HEAVY = {"numpy", "onnx", "onnx_graphsurgeon", "onnxruntime", "onnxruntime_extensions", "rich", "transformers"}


def imported(code: str, *arguments: object) -> set[str]:
    """Which of HEAVY a fresh Python has imported after `code`, which sees `arguments` in sys.argv."""
    script = f"import sys\n{code}\nprint(*sys.modules, sep='\\n')"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return HEAVY & set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import onnx_kivi") == set()


def test_inspecting_imports_no_runtime_and_no_writer_of_graphs(tiny: Path) -> None:
    assert imported("import onnx_kivi as kivi\nkivi.inspect(sys.argv[1])", tiny) == {"numpy", "onnx"}


def test_a_native_session_imports_no_graph_and_no_python_host(rewritten: Callable[[int], Path]) -> None:
    pytest.importorskip("onnx_kivi.runtime.native", reason="nothing is compiled here", exc_type=ImportError)
    code = "import onnx_kivi as kivi\nkivi.Session(sys.argv[1], host='native')"
    assert imported(code, rewritten(8)) == {"numpy", "onnxruntime"}


def test_every_public_name_is_there() -> None:
    assert set(kivi.__all__) <= set(dir(kivi))
    for name in kivi.__all__:
        assert getattr(kivi, name) is not None
    with pytest.raises(AttributeError, match="module 'onnx_kivi' has no attribute 'no_such_thing'"):
        kivi.no_such_thing  # noqa: B018


def test_a_star_import_brings_every_public_name() -> None:
    names: dict[str, object] = {}
    exec("from onnx_kivi import *", names)
    assert {name: names[name] for name in kivi.__all__} == {name: getattr(kivi, name) for name in kivi.__all__}


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse(Path(kivi.__file__).read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {a.asname or a.name for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen | {"__version__"} == set(kivi.__all__)


@pytest.mark.parametrize("first", ["onnx_kivi.rewrite.pipeline", "onnx_kivi.cli.parser", "onnx_kivi.rewrite"])
def test_the_name_rewrite_is_the_function_whatever_was_imported_before(first: str) -> None:
    code = (
        f"import onnx_kivi, {first}\nassert onnx_kivi.rewrite.__name__ == 'rewrite'\nassert callable(onnx_kivi.rewrite)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def uncompiled(folder: Path) -> Path:
    """A folder that holds the package without what is compiled."""
    source = Path(kivi.__file__).parent
    shutil.copytree(source, folder / "onnx_kivi", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def reason(folder: Path) -> str:
    """Why a Python that is started in `folder` has no native backend."""
    code = """import onnx_kivi
from onnx_kivi.runtime.select import get_backend
try:
    get_backend("native")
except onnx_kivi.BackendUnavailableError as error:
    print(error)"""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=clean, check=True, capture_output=True, text=True).stdout.strip()


def test_a_package_that_was_not_compiled_asks_for_a_compiler(tmp_path: Path) -> None:
    said = reason(uncompiled(tmp_path))
    assert "expected the compiled module onnx_kivi._native, got" in said
    assert "install a C++ compiler" in said


def test_the_source_tree_says_that_it_is_one(tmp_path: Path) -> None:
    root = uncompiled(tmp_path)
    (root / "pyproject.toml").touch()
    (root / "custom_ops").mkdir()
    said = reason(root)
    assert f"got the source tree at {root}, not the installed package" in said
    assert "run from another folder or set PYTHONSAFEPATH=1" in said
    assert "compiler" not in said
    assert len(said.splitlines()) == 1
