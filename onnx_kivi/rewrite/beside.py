"""Which file beside a model has the decoder with a past, as optimum's exports hold several of one model."""

from __future__ import annotations

from pathlib import Path

WITH_PAST = ("decoder_with_past_model.onnx", "decoder_model_merged.onnx")


def beside(model: Path) -> str:
    """What to do instead with a model without a past, or whose parts can't be told; "" if no file is there for it."""
    there = (name for name in WITH_PAST if name != model.name and model.with_name(name).is_file())
    return next((f"rewrite {name}, which lies beside it" for name in there), "")
