"""How many bits an adaptive coder takes for integers, as something to train against. Pure functions.

Integers of a matrix are taken for two-sided geometric ones, `P(q) = (1 - t) / (1 + t) * t**|q|`, whose mean magnitude
`m = 2t / (1 - t**2)` is that of the entry's row times that of its column over that of all: what the contexts of
`core.coding` know of an entry. A code that learns these means meanwhile has the same slope: at the most likely mean the
length does not change with it, so means are held while magnitudes move. Two-part codes: Rissanen, Automatica 14, 1978;
networks trained by their length: Hinton and van Camp, COLT 1993; with a learned code: Oktay et al., arXiv:1906.06624.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BEFORE = 3  # entries of average size that every row and column is taken to have had, as in `core.coding.contexts`
LEAST = 1e-6  # mean magnitude below which none is taken to be


def expected(magnitudes: Tensor) -> Tensor:
    """The mean magnitude that an adaptive code expects of each entry of [rows, columns], from its row and its column.

    Rows and columns are drawn towards the mean of all by `BEFORE` entries of that size.
    """
    rows, columns = magnitudes.shape
    mean = magnitudes.mean().clamp_min(LEAST)
    of_rows = (magnitudes.sum(1) + BEFORE * mean) / (columns + BEFORE)
    of_columns = (magnitudes.sum(0) + BEFORE * mean) / (rows + BEFORE)
    return of_rows[:, None] * (of_columns / mean)


def price(mean: Tensor) -> Tensor:
    """The bits that one more in magnitude takes where the mean magnitude is `mean` (above 0): `-log2 t`.

    `t = (sqrt(1 + m**2) - 1) / m` solves `m = 2t / (1 - t**2)`, and `-ln t = asinh(1 / m)`.
    """
    return torch.asinh(1 / mean) / math.log(2)


def length(magnitudes: Tensor, mean: Tensor) -> Tensor:
    """The bits of each integer, by magnitude, where the mean magnitude is `mean`; the sign is among them."""
    per_step = price(mean)
    decay = torch.exp2(-per_step)
    return torch.log2((1 + decay) / (1 - decay)) + magnitudes * per_step


def total(integers: Tensor) -> float:
    """The bits of a matrix of integers [rows, columns], its own means known."""
    magnitudes = integers.abs().float()
    return float(length(magnitudes, expected(magnitudes).clamp_min(LEAST)).sum())
