"""Tokens in, logits out: sessions, stepping, generation. Knows no graph."""
