"""The mathematics of dropout that leaves sparsity: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

K1, K2, K3 = 0.63576, 1.87320, 1.48695  # constants of the fit, Molchanov et al., arXiv:1701.05369, equation 14
TINY = 1e-8


def log_alpha(weight: Tensor, log_variance: Tensor) -> Tensor:
    """The logarithm of the noise's variance over the squared weight, by weight: how little the weight matters."""
    return log_variance - torch.log(weight.square() + TINY)


def divergence(ratio: Tensor) -> Tensor:
    """The sum over weights of the approximate Kullback-Leibler divergence to the log-uniform prior, a scalar.

    `ratio` is `log_alpha`. The fit of Molchanov et al., arXiv:1701.05369, equation 14, with its constant chosen so that
    the divergence falls to 0 as the noise grows.
    """
    negative = K1 * torch.sigmoid(K2 + K3 * ratio) - 0.5 * torch.nn.functional.softplus(-ratio) - K1
    return -negative.sum()


def candidates(weight: Tensor, share: float, axis: int = 0) -> Tensor:
    """Which weights targeted dropout aims at: of each output (index of `axis`) the `share` of least magnitude.

    A boolean mask of the weight's shape; the number is rounded down. Gomez et al., arXiv:1905.13678, section 3.1.
    """
    moved = weight.detach().abs().movedim(axis, 0)
    rows = moved.flatten(1)
    count = int(share * rows.shape[1])
    order = torch.sort(rows, dim=1, stable=True).indices[:, :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).reshape(moved.shape).movedim(0, axis)


def risen(t: float, ramp: float, share: float, rate: float) -> tuple[float, float]:
    """The share of weights aimed at and the chance to drop them, at `t` in [0, 1] of a training.

    The share rises from 0 to `share` until `ramp` (Gomez et al., arXiv:1905.13678, 5.4); from there the chance rises
    from `rate` to 1.
    """
    if t < ramp:
        return share * t / ramp, rate
    return share, rate + (1 - rate) * (t - ramp) / (1 - ramp)
