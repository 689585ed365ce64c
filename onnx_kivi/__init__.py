"""Makes the KV cache of any exported ONNX decoder small and fast: 8, 4 or 2 bits inside the process (KIVI)."""
