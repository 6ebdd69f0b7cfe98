"""AdaRound: whether each weight is rounded up or down is learned from what its layer computes.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", arXiv:2004.10568. Pure functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

STRETCH = (-0.1, 1.1)  # the sigmoid is stretched beyond 0 and 1, so that both are reached (zeta and gamma)
WARM = 0.2  # the share of the time in which nothing pulls to 0 or 1
BETAS = (20.0, 2.0)  # the exponent of the pull at its beginning and at the end


def share_up(variable: Tensor) -> Tensor:
    """How far up each weight is rounded, 0 to 1: the rectified sigmoid of `variable` (equation 23)."""
    low, high = STRETCH
    return (torch.sigmoid(variable) * (high - low) + low).clamp(0, 1)


def variable_of(share: Tensor) -> Tensor:
    """The variable for which `share_up` gives `share`, of values in 0 to 1."""
    low, high = STRETCH
    return -torch.log((high - low) / (share - low) - 1)


def undecided(share: Tensor, beta: float) -> Tensor:
    """The regularizer, summed: 0 where every share is 0 or 1, the number of weights where all are 1/2 (equation 24)."""
    return (1 - (2 * share - 1).abs() ** beta).sum()


def exponent(time: float) -> float:
    """The exponent of the regularizer at `time` from 0 to 1: from 20 down to 2 along a cosine, after the warm-up.

    A large exponent leaves most weights free; a small one pulls all to an end.
    """
    progress = max(0.0, (time - WARM) / (1 - WARM))
    high, low = BETAS
    return low + 0.5 * (high - low) * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))


def rounded(steps: Tensor, share: Tensor, low: int, high: int) -> Tensor:
    """The weights in units of their scale, each moved from the integer below it by `share`, cut to low...high
    (equation 22).
    """
    return (torch.floor(steps) + share).clamp(low, high)
