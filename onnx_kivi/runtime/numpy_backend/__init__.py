"""The normative backend, in plain NumPy: quantization, attention, rows, steps, store."""
