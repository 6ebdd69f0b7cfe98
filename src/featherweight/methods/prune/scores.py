"""How much a unit or a weight is worth: pure functions on tensors."""

from __future__ import annotations

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


def keep_largest(score: Tensor, count: int) -> Tensor:
    """A boolean mask of the shape of `score` that is True for exactly `count` entries: the largest; of equal ones the
    first.
    """
    order = torch.sort(score.flatten(), descending=True, stable=True).indices
    keep = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    keep[order[:count]] = True
    return keep.reshape(score.shape)


def keep_largest_of_all(scores: list[Tensor], share: float, least: float = 0.0) -> list[Tensor]:
    """One mask per tensor; together they keep exactly `share` of all entries (rounded), the largest.

    Each tensor keeps at least a share of `least` of its own entries, and at least one, whatever the others have;
    where these alone are more than `share`, only they are kept.
    """
    sure = [keep_largest(score, max(1, round(min(least, share) * score.numel()))) for score in scores]
    total = sum(score.numel() for score in scores)
    rest = max(0, round(share * total) - sum(int(mask.sum()) for mask in sure))
    flat = torch.cat(
        [score.masked_fill(mask, -1).flatten() for score, mask in zip(scores, sure)]
    )  # scores are not negative
    more = keep_largest(flat, rest)
    parts = more.split([score.numel() for score in scores])
    return [mask | part.reshape(mask.shape) for mask, part in zip(sure, parts)]
