"""A matrix as a product of two thin ones. Pure functions.

Weights are [outputs, columns], factors [outputs, rank] and [rank, columns]. `moment` [columns, columns] is the second
moment of the columns' inputs: with it the error of the *outputs* is the least that a rank allows, sum over inputs of
`|W x - L R x|^2`, by the singular values of `W H^(1/2)` (Chen et al., DRONE, NeurIPS 2021; Wang et al., SVD-LLM,
arXiv:2403.07378). Without, that of the weight itself is (Eckart and Young, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """All factors of a matrix, by falling energy: `left` [outputs, n], `right` [n, columns], `energy` [n]."""

    left: Tensor
    right: Tensor
    energy: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The factors of rank `rank`."""
        return self.left[:, :rank], self.right[:rank]

    def missed(self, rank: int) -> float:
        """The share of the energy that `rank` leaves out."""
        return float(self.energy[rank:].sum() / self.energy.sum().clamp_min(1e-300))


def decompose(weight: Tensor, moment: Tensor | None = None, damping: float = 1e-4) -> Decomposition:
    """The factors of `weight`, each with the same share of the singular values; `damping` times the moment's mean
    diagonal is added to its diagonal.
    """
    matrix = weight.double()
    if moment is None:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        root, inverse = roots(moment, damping)
        u, s, v = torch.linalg.svd(matrix @ root, full_matrices=False)
        v = v @ inverse
    half = s.sqrt()
    return Decomposition((u * half).to(weight.dtype), (half[:, None] * v).to(weight.dtype), s.square())


def roots(moment: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The symmetric root of a second moment, and its inverse, in double precision."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp_min(0) + damping * values.clamp_min(0).mean().clamp_min(1e-30)
    half = values.sqrt()
    return (vectors * half) @ vectors.T, (vectors / half) @ vectors.T


def cost(outputs: int, columns: int, rank: int) -> int:
    """Parameters of two factors."""
    return rank * (outputs + columns)


def largest_rank(outputs: int, columns: int, parameters: float) -> int:
    """The largest rank whose factors have at most so many parameters."""
    return min(outputs, columns, int(parameters // (outputs + columns)))
