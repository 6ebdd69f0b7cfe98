"""Layers in factors: low rank and tensor networks."""
