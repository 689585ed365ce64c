"""Runs the ops: host (onnxruntime calls it), backend (store and kernel as one unit), reference (the math)."""
