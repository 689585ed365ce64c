"""Runs models to compare them: equality, perplexity, speed, the demo."""
