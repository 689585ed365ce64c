"""Where a model lies (a file, or a folder that holds model.onnx), and where this package does."""

from __future__ import annotations

import os
from pathlib import Path

MODEL_FILE = "model.onnx"


def model_path(model: str | os.PathLike[str]) -> Path:
    """The .onnx file that `model` names: itself, or model.onnx inside it if it is a folder."""
    path = Path(model)
    return path / MODEL_FILE if path.is_dir() else path


def source_tree() -> Path | None:
    """The root of the source tree, if the package was imported from there; None for an installed one."""
    root = Path(__file__).parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "custom_ops").is_dir() else None
