"""The zoo of models/zoo as the tests see it: its models, which of them are refused and why, and the table of both.

`python tests/zoo.py` writes the table into models/zoo/README.md; the tests hold it to what they find.
"""

from __future__ import annotations

from pathlib import Path

ZOO = Path(__file__).parents[1] / "models" / "zoo"
README = ZOO / "README.md"
MODELS = {path.parent.relative_to(ZOO).as_posix(): path for path in sorted(ZOO.rglob("model.onnx"))}

# Model: a part of the reason for which it is left whole.
REFUSED = {
    "dynamo-18/deepseek_v3_dense": "latent cache: .* not a key/value cache",
}

START, END = "<!-- zoo table: python tests/zoo.py -->\n", "<!-- end of zoo table -->"
EQUAL_MARK, REFUSED_MARK = "=", "x"


def table() -> str:
    """Markdown: architectures by exporter, each equal, refused or absent."""
    cells = {}
    for name in MODELS:
        style, _, architecture = name.partition("/")
        cells[architecture.replace("/", " "), style] = REFUSED_MARK if name in REFUSED else EQUAL_MARK
    styles = sorted({style for _, style in cells})
    rows = [["architecture", *styles], ["---"] * (1 + len(styles))]
    for architecture in sorted({architecture for architecture, _ in cells}):
        rows.append([architecture, *(cells.get((architecture, style), "") for style in styles)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def readme() -> str:
    """The zoo's README with its table brought up to date."""
    before, rest = README.read_text(encoding="utf-8").split(START)
    return before + START + "\n" + table() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(readme(), encoding="utf-8")
