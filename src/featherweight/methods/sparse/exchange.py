"""Which connections of a sparse layer are given up for which others: pure functions on tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from featherweight.model.masks import keep_largest


def decayed(fraction: float, t: float, stop: float) -> float:
    """The share of connections to exchange at `t` in [0, 1]: falls on a cosine to zero at `stop`, and stays there.

    Evci et al., arXiv:1911.11134, section 3 (2), after Dettmers and Zettlemoyer, arXiv:1907.04840.
    """
    return fraction / 2 * (1 + math.cos(math.pi * t / stop)) if t < stop else 0.0


def exchange(keep: Tensor, weight: Tensor, growth: Tensor, count: int) -> Tensor:
    """The mask `keep` after `count` connections of least magnitude were dropped and as many were grown.

    Those with the largest `growth` (not negative) come in, of all that are not kept then: one just dropped may stay.
    All tensors have the weight's shape. Algorithm 1 of Evci et al., arXiv:1911.11134; with random `growth` that of
    Mocanu et al., arXiv:1707.04780.
    """
    left = keep_largest(weight.abs().masked_fill(~keep, -1.0), int(keep.sum()) - count)
    return left | keep_largest(growth.masked_fill(left, -1.0), count)


def random_mask(shape: tuple[int, ...], count: int, generator: torch.Generator) -> Tensor:
    """A boolean mask that is True at `count` places drawn without preference."""
    keep = torch.zeros(math.prod(shape), dtype=torch.bool)
    keep[torch.randperm(len(keep), generator=generator)[:count]] = True
    return keep.reshape(shape)
