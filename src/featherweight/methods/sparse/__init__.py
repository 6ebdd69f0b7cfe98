"""Sparse training and dropout: networks that are trained sparse, and units, weights and blocks left out on the way."""
