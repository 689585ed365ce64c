"""Attention families: each module finds one form of `<KV-cache concat -> attention>` and returns the same Site."""
