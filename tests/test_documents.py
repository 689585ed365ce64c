"""What the documents and the sources point at is there: files, tests and commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onnx_kivi.cli.parser import build_parser

ROOT = Path(__file__).parents[1]
FOLDERS = ("onnx_kivi", "custom_ops", "models", "tests", "examples")
DOCUMENTS = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
TEST = re.compile(r"\b(tests/[\w/]+\.py)::(\w+)")
FILE = re.compile(
    r"(?<![\w/.])((?!\S*NAME)(?:onnx_kivi|custom_ops|tests|models|examples)/[\w/]+\.(?:py|md|hpp|cpp|h))\b"
)
SCRIPT = re.compile(r"\b(?:python|bash) ((?:tests|examples|models|\.ci)/[\w./]+)")
COMMAND = re.compile(r"\bonnx-kivi ([a-z][a-z-]+)\b")

SOURCES = [
    path for folder in FOLDERS for ext in ("py", "hpp", "cpp", "h") for path in (ROOT / folder).rglob(f"*.{ext}")
]

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


@every_document
def test_links_lead_somewhere(path: Path) -> None:
    absent = [link for link in LINK.findall(path.read_text(encoding="utf-8")) if not (path.parent / link).exists()]
    assert not absent


@every_document
def test_named_tests_scripts_and_commands_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    absent = [f"{file}::{name}" for file, name in TEST.findall(text) if f"def {name}(" not in read(file)]
    absent += [script for script in SCRIPT.findall(text) if not (ROOT / script).is_file()]
    absent += sorted(set(COMMAND.findall(text)) - commands())
    assert not absent


def test_named_files_exist() -> None:
    named = [(path, name) for path in [*DOCUMENTS, *SOURCES] for name in FILE.findall(path.read_text(encoding="utf-8"))]
    assert len(named) > 20
    absent = [f"{path.relative_to(ROOT)}: {name}" for path, name in named if not (ROOT / name).is_file()]
    assert not absent


def test_the_documents_point_at_something() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    assert all(pattern.search(text) for pattern in (LINK, TEST, SCRIPT, COMMAND))


def read(file: str) -> str:
    path = ROOT / file
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def commands() -> set[str]:
    (choices,) = (action.choices for action in build_parser()._actions if isinstance(action.choices, dict))
    return set(choices)
