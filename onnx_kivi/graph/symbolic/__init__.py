"""Symbolic sizes and small values of every tensor, by abstract interpretation of the graph."""
