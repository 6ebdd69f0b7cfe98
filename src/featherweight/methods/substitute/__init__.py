"""Lighter architectures: other layers that do nearly the same."""
