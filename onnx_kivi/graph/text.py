"""Small models written as text, in the syntax of onnx.parser."""

from __future__ import annotations

import onnx.parser


def parse_model(text: str) -> bytes:
    """Serialized model of `text`. Raises onnx.parser.ParseError where the text is no model."""
    model: bytes = onnx.parser.parse_model(text).SerializeToString()
    return model
