"""Random rotations that spread every entry over all others, and what they do to a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.trellis import hadamard


def random_rotation(size: int, generator: torch.Generator, ones: bool = False) -> Tensor:
    """A random orthogonal matrix [size, size] of entries that are nearly alike in magnitude; float64.

    The Kronecker product of the largest Hadamard matrix of a power of two that divides `size` and a random orthogonal
    matrix of what is left, between random signs (arXiv:2402.04396, section 3.1; arXiv:2404.00456). With `ones` it
    leaves the vector of ones as it is: a reflection puts that back, which moves entries by some multiples of 1 / size.
    """
    odd = size // (size & -size)
    rows, columns = torch.randint(0, 2, (2, size), generator=generator).double() * 2 - 1
    spread = hadamard(torch.eye(size // odd, dtype=torch.float64))
    found = torch.kron(random_orthogonal(odd, generator), spread) * rows[:, None] * columns
    return _back_to_ones(found) if ones else found


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size] drawn from the uniform (Haar) distribution; float64."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    found, triangle = torch.linalg.qr(gaussian)
    return (found * triangle.diagonal().sign()).contiguous()


def _back_to_ones(rotation: Tensor) -> Tensor:
    """`rotation` followed by the reflection that swaps where it sends the vector of ones, and that vector."""
    off = rotation.sum(1) - 1
    length = off.square().sum()
    if float(length) < 1e-18 * len(off):
        return rotation
    return rotation - 2 * torch.outer(off, off @ rotation) / length


def turned(tensor: Tensor, dim: int, rotation: Tensor) -> Tensor:
    """`tensor` with every vector along `dim` multiplied by `rotation`, block by block if it is longer."""
    rows = tensor.double().movedim(dim, -1)
    blocks = rows.unflatten(-1, (-1, len(rotation))) @ rotation.to(rows.device).mT
    return blocks.flatten(-2).movedim(-1, dim).to(tensor.dtype).contiguous()


def peak(weight: Tensor) -> float:
    """The largest magnitude over the root mean square: how far outliers stand out (incoherence); 0 if all are zero."""
    weight = weight.detach().double()
    return float(weight.abs().max() / weight.square().mean().sqrt().clamp_min(1e-300))
