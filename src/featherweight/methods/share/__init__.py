"""Weights, or whole layers, that share one value."""
