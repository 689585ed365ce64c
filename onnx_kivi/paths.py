"""Where a model lies: a file, or a folder that holds model.onnx."""

from __future__ import annotations

import os
from pathlib import Path

MODEL_FILE = "model.onnx"


def model_path(model: str | os.PathLike[str]) -> Path:
    """The .onnx file that `model` names: itself, or model.onnx inside it if it is a folder."""
    path = Path(model)
    return path / MODEL_FILE if path.is_dir() else path
