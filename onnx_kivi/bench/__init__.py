"""Measures: `kernel` one decode step of attention against onnxruntime's own, `model` whole models by context length."""
