"""Heads of keys and values that become one. Pure functions, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-6  # times the mean diagonal of a moment


def pooled(weight: Tensor, many: int) -> Tensor:
    """The means of each `many` neighbouring heads: [heads, width, inputs] to [heads / many, width, inputs]. Ainslie et
    al., arXiv:2305.13245, section 2.1.
    """
    return weight.double().unflatten(0, (-1, many)).mean(1)


def shared(maps: Tensor, moment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """One map into `width` entries and one out of them for each of several, of least error of what these give.

    `maps` [several, outputs, inputs] are what each head does with its inputs, which have the second moment `moment`
    [inputs, inputs]. Gives `inner` [width, inputs] and `outer` [several, outputs, width] with the least
    `sum |(maps - outer inner) x|^2`: the leading singular vectors of all maps on whitened inputs (Eckart and Young).
    """
    values, vectors = torch.linalg.eigh(damped(moment))
    root = (vectors * values.clamp_min(1e-30).sqrt()) @ vectors.T
    inverse = (vectors * values.clamp_min(1e-30).rsqrt()) @ vectors.T
    white = maps.double() @ root
    gram = torch.einsum("hoi,hoj->ij", white, white)
    leading = torch.linalg.eigh(gram)[1][:, -width:]
    return leading.T @ inverse, white @ leading


def outward(maps: Tensor, moment: Tensor, inner: Tensor) -> Tensor:
    """The best `outer` [several, outputs, width] for a given `inner`, by least squares on the inputs; see `shared`."""
    crossed = damped(moment) @ inner.T
    return torch.linalg.solve(inner @ crossed, (maps.double() @ crossed).mT).mT


def damped(moment: Tensor) -> Tensor:
    """The moment with a little on its diagonal, so that it can be inverted.

    Of fewer tokens than inputs, summed in single precision, a moment has eigenvalues below zero, which become zero.
    """
    found = moment.double().clone()
    little = RIDGE * found.diagonal().mean().clamp_min(1e-30)
    found.diagonal().add_(little)
    if int(torch.linalg.cholesky_ex(found).info) == 0:
        return found
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * (values.clamp_min(0) + little)) @ vectors.T


def balanced(inner: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """The same two with entries of equal size on both sides, so that neither is hard to train or to quantize."""
    scale = (outer.square().mean((0, 1)).sqrt() / inner.square().mean(1).sqrt().clamp_min(1e-30)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return inner * scale[:, None], outer / scale


def missed_share(maps: Tensor, moment: Tensor, inner: Tensor, outer: Tensor) -> float:
    """The share of the energy of what `maps` give that `outer inner` misses."""
    system = moment.double()
    gone, whole = maps.double() - outer @ inner, maps.double()
    energy = torch.einsum("hoi,ij,hoj->", gone, system, gone)
    return float(energy / torch.einsum("hoi,ij,hoj->", whole, system, whole).clamp_min(1e-300))
