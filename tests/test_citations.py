"""A section that the sources cite is there to be read."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("onnx_kivi", "custom_ops", "models", "tests", "examples")
SOURCES = [
    path for folder in FOLDERS for ext in ("py", "cpp", "hpp", "h") for path in (ROOT / folder).rglob(f"*.{ext}")
]
CITATION = re.compile(r'\b((?:README|CONTRIBUTING|DECISIONS|SPEC)(?:\.md)?), "([^"\n]+)"')


def headings(document: str) -> set[str]:
    name = f"{document.removesuffix('.md')}.md"
    path = next((path for path in (ROOT / name, ROOT / "onnx_kivi" / name) if path.is_file()), None)
    text = path.read_text(encoding="utf-8") if path else ""
    return {line.lstrip("# ") for line in text.splitlines() if line.startswith("#")}


def test_cited_sections_exist() -> None:
    cited = [(path, *c) for path in SOURCES for c in CITATION.findall(path.read_text(encoding="utf-8"))]
    assert cited
    absent = [
        f"{path.relative_to(ROOT)}: {document}, {name!r}"
        for path, document, name in cited
        if name not in headings(document)
    ]
    assert not absent
