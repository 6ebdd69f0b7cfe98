"""How much a unit or a weight is worth: pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slices(tensor: Tensor, dim: int, positions: Tensor) -> Tensor:
    """The entries of `tensor` that belong to each unit: units x entries.

    `positions` (units x indices per unit) names the indices along `dim` that go with each unit.
    """
    moved = tensor.movedim(dim, 0)
    return moved[positions.reshape(-1)].reshape(len(positions), -1)


def l1(weights: Tensor) -> Tensor:
    """Sum of magnitudes of each row (Li et al., arXiv:1608.08710)."""
    return weights.abs().sum(1)


def l2(weights: Tensor) -> Tensor:
    """Sum of squares of each row; the square root of the sum over all slices of a unit is its norm."""
    return weights.square().sum(1)


def taylor(weights: Tensor, gradients: Tensor) -> Tensor:
    """Squared first-order estimate of what the loss changes by when a row is set to zero (Molchanov et al.,
    arXiv:1906.10771).
    """
    return (weights * gradients).sum(1).square()


def relative(scores: Tensor) -> Tensor:
    """Scores of one group over their mean, so that groups of unlike scale can be ranked together; all ones if the
    mean is zero.
    """
    mean = scores.mean()
    return scores / mean if mean > 0 else torch.ones_like(scores)


def cubic(final: float, t: float, start: float = 0.0) -> float:
    """Sparsity at time `t` in [0, 1] on the way from `start` to `final` (Zhu and Gupta, arXiv:1710.01878)."""
    return final + (start - final) * (1 - min(max(t, 0.0), 1.0)) ** 3


def group_fisher(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Square of the first-order change of the loss when units are taken out of all coupled weights together.

    `parts` holds weights and gradients of each coupled parameter, units x entries. The changes are summed before they
    are squared: for the gradients of one input the mean over inputs is a unit's entry in the diagonal of the Fisher
    information of masks (Liu et al., arXiv:2108.00708, equations 4 to 6).
    """
    return torch.stack([(weights * gradients).sum(1) for weights, gradients in parts]).sum(0).square()
