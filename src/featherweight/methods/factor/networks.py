"""Tensors as networks of smaller ones: Tucker, CP, tensor train. Pure functions, in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


# -- Tucker ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tucker:
    """A convolution's weight as `outputs` [o, r] times `core` [r, s, ...] times `inputs` [i, s]."""

    outputs: Tensor
    core: Tensor
    inputs: Tensor


def tucker(weight: Tensor, ranks: tuple[int, int], sweeps: int = 10) -> Tucker:
    """The best known factors of the first two modes of `weight` [o, i, ...] (Tucker-2): leading singular vectors of its
    unfoldings, then each mode again for what the other leaves (higher-order orthogonal iteration: De Lathauwer et al.,
    2000; of convolutions: Kim et al., arXiv:1511.06530).
    """
    tensor = weight.double()
    outputs, inputs = _leading(tensor, 0, ranks[0]), _leading(tensor, 1, ranks[1])
    for _ in range(sweeps):
        outputs = _leading(_project(tensor, inputs, 1), 0, ranks[0])
        inputs = _leading(_project(tensor, outputs, 0), 1, ranks[1])
    core = _project(_project(tensor, outputs, 0), inputs, 1)
    return Tucker(*(each.to(weight.dtype) for each in (outputs, core, inputs)))


def _leading(tensor: Tensor, mode: int, rank: int) -> Tensor:
    """The leading left singular vectors of an unfolding, [size, rank]."""
    return torch.linalg.svd(tensor.movedim(mode, 0).flatten(1), full_matrices=False)[0][:, :rank]


def _project(tensor: Tensor, factor: Tensor, mode: int) -> Tensor:
    """`tensor` with one mode expressed in the columns of `factor`."""
    return torch.tensordot(factor.T, tensor, dims=([1], [mode])).movedim(0, mode)


# -- CP ----------------------------------------------------------------------------------------------------------------
def cp(
    weight: Tensor, rank: int, generator: torch.Generator, sweeps: int = 100, tolerance: float = 1e-6
) -> list[Tensor]:
    """Factors [size, rank], one for each mode of `weight`, whose summed outer products come near it.

    Alternating least squares from leading singular vectors (random columns where there are not enough), a ridge of
    1e-9 of the system's mean diagonal for stability, until a sweep gains less than `tolerance` of the energy (Carroll
    and Chang, 1970; of convolutions: Lebedev et al., arXiv:1412.6553). Columns have equal norms in all modes.
    """
    tensor = weight.double()
    factors = [_started(tensor, mode, rank, generator) for mode in range(tensor.dim())]
    energy, last = float(tensor.square().sum()), math.inf
    for _ in range(sweeps):
        for mode in range(tensor.dim()):
            factors[mode], product = _least_squares(tensor, factors, mode)
        error = energy + float(_grams(factors).sum() - 2 * (product * factors[-1]).sum())  # |T - S|^2, S never made
        if last - error < tolerance * energy:
            break
        last = error
    return [each.to(weight.dtype) for each in _balanced_norms(factors)]


def outer(factors: Sequence[Tensor]) -> Tensor:
    """The sum over columns of the outer products of the factors' columns."""
    total = factors[0]
    for factor in factors[1:]:
        total = total.unsqueeze(-2) * factor
    return total.sum(-1)


def _started(tensor: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    found = _leading(tensor, mode, rank)
    missing = rank - found.shape[1]
    drawn = torch.randn(len(found), max(0, missing), generator=generator, dtype=torch.float64).to(tensor.device)
    return torch.cat([found, drawn / math.sqrt(len(found))], 1)


def _least_squares(tensor: Tensor, factors: list[Tensor], mode: int) -> tuple[Tensor, Tensor]:
    """The factor of one mode that is best for the others, and the tensor's product with these, both [size, rank]."""
    others = [factor for place, factor in enumerate(factors) if place != mode]
    gram = _grams(others)
    gram = gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    total = tensor.movedim(mode, 0)
    product = total @ others[-1]  # the last mode is summed; each other one follows, entry by entry
    for factor in reversed(others[:-1]):
        product = (product * factor).sum(-2)
    return torch.linalg.solve(gram, product.T).T, product


def _grams(factors: Sequence[Tensor]) -> Tensor:
    """The entrywise product of the factors' Gram matrices, [rank, rank]: its sum is the energy of `outer`."""
    total = factors[0].T @ factors[0]
    for factor in factors[1:]:
        total = total * (factor.T @ factor)
    return total


def _balanced_norms(factors: list[Tensor]) -> list[Tensor]:
    norms = torch.stack([factor.norm(dim=0).clamp_min(1e-30) for factor in factors])
    mean = norms.log().mean(0).exp()
    return [factor * (mean / norm) for factor, norm in zip(factors, norms)]


# -- tensor train ------------------------------------------------------------------------------------------------------
def tensor_train(matrix: Tensor, rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]) -> list[Tensor]:
    """Cores [rank before, column k, row k, rank behind] of a matrix [rows, columns] as a matrix product operator.

    `rows` and `columns` are the dimensions that the matrix's fall into; the ranks that come out are at most `ranks`.
    Singular values are cut off one mode after the other (TT-SVD: Oseledets, 2011, algorithm 1), so the error is at most
    sqrt(cores - 1) times the least possible.
    """
    order = len(rows)
    pairs = [axis for k in range(order) for axis in (order + k, k)]
    rest = matrix.double().reshape(*rows, *columns).permute(pairs).reshape(1, -1)
    cores = []
    for k in range(order - 1):
        u, s, v = torch.linalg.svd(rest.reshape(len(rest) * columns[k] * rows[k], -1), full_matrices=False)
        rank = min(ranks[k], len(s))
        cores.append(u[:, :rank].reshape(-1, columns[k], rows[k], rank))
        rest = s[:rank, None] * v[:rank]
    cores.append(rest.reshape(-1, columns[-1], rows[-1], 1))
    return [core.to(matrix.dtype) for core in cores]


def contracted(cores: Sequence[Tensor]) -> Tensor:
    """The matrix [rows, columns] that the cores of a tensor train stand for."""
    total = cores[0][0]  # columns, rows, rank
    for core in cores[1:]:
        total = torch.einsum("crk,kdsl->cdrsl", total, core).flatten(2, 3).flatten(0, 1)
    return total[..., 0].T


def train_cost(rows: Sequence[int], columns: Sequence[int], rank: int) -> int:
    """Entries of all cores with ranks of at most `rank`."""
    ranks = (1, *train_ranks(rows, columns, rank), 1)
    return sum(ranks[k] * n * m * ranks[k + 1] for k, (m, n) in enumerate(zip(rows, columns)))


def train_ranks(rows: Sequence[int], columns: Sequence[int], rank: int) -> list[int]:
    """`rank` between all cores, or less where what lies on one side has no more dimensions."""
    sizes = [m * n for m, n in zip(rows, columns)]
    return [min(rank, math.prod(sizes[: k + 1]), math.prod(sizes[k + 1 :])) for k in range(len(sizes) - 1)]


def divided(size: int, parts: int) -> list[int]:
    """`size` as a product of so many factors, as equal as its prime factors allow, the largest first."""
    found = [1] * parts
    for prime in sorted(_primes(size), reverse=True):
        found[found.index(min(found))] *= prime
    return sorted(found, reverse=True)


def _primes(size: int) -> list[int]:
    found, divisor = [], 2
    while size > 1:
        while size % divisor == 0:
            found.append(divisor)
            size //= divisor
        divisor += 1
    return found
