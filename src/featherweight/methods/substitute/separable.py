"""A convolution as a depthwise and a pointwise one. Pure functions, in double precision.

`weight` is [outputs, inputs, places] (places of the kernel), `depthwise` [inputs, multiplier, places], `pointwise`
[outputs, inputs, multiplier]. `moment` [inputs * places, inputs * places] is the second moment of the patches that the
kernel sees: the error is that of the layer's outputs, `sum |(W - P D) x|^2` over patches x.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-6  # times the mean diagonal of a system


def product(depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """The weight [outputs, inputs, places] that the two stand for."""
    return torch.einsum("oim,imk->oik", pointwise, depthwise)


def separated(weight: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """The two of least error of the weight itself: each input's [outputs, places] by its leading singular vectors (Guo
    et al., arXiv:1808.05517). Gives `depthwise` and `pointwise`.
    """
    u, s, v = torch.linalg.svd(weight.double().movedim(1, 0), full_matrices=False)
    rank = min(multiplier, s.shape[-1])
    return v[:, :rank], (u * s[:, None])[:, :, :rank].movedim(0, 1)


def fitted(weight: Tensor, moment: Tensor, multiplier: int, sweeps: int = 5) -> tuple[Tensor, Tensor]:
    """The two of little error of the layer's outputs: from `separated`, each by least squares for the other in turn.

    The error falls with every sweep. The system of the depthwise one has inputs * multiplier * places unknowns.
    """
    target, damped = weight.double(), moment.double().clone()
    damped.diagonal().add_(RIDGE * damped.diagonal().mean().clamp_min(1e-30))
    depthwise, pointwise = separated(weight, multiplier)
    for sweep in range(sweeps + 1):
        pointwise = _best_pointwise(target, damped, depthwise)
        if sweep < sweeps:
            depthwise = _best_depthwise(target, damped, pointwise, depthwise.shape)
    return depthwise, pointwise


def output_error(weight: Tensor, near: Tensor, moment: Tensor) -> float:
    """The share of the energy of the outputs that `near` misses."""
    missed, whole = (weight - near).double().flatten(1), weight.double().flatten(1)
    system = moment.double()
    return float(((missed @ system) * missed).sum() / ((whole @ system) * whole).sum().clamp_min(1e-300))


def energy(depthwise: Tensor, moment: Tensor) -> Tensor:
    """The mean square of what each depthwise kernel gives, [inputs, multiplier]."""
    inputs, _, places = depthwise.shape
    own = moment.to(depthwise).reshape(inputs, places, inputs, places).diagonal(dim1=0, dim2=2)
    return torch.einsum("imk,kli,iml->im", depthwise, own, depthwise)


def _best_pointwise(target: Tensor, moment: Tensor, depthwise: Tensor) -> Tensor:
    inputs, multiplier, places = depthwise.shape
    spread = torch.zeros(inputs, multiplier, inputs, places, dtype=depthwise.dtype, device=depthwise.device)
    index = torch.arange(inputs, device=depthwise.device)
    spread[index, :, index] = depthwise
    matrix = spread.reshape(inputs * multiplier, inputs * places)
    crossed = matrix @ moment
    system = crossed @ matrix.T
    system.diagonal().add_(RIDGE * system.diagonal().mean().clamp_min(1e-30))
    found = torch.linalg.solve(system, crossed @ target.flatten(1).T).T
    return found.reshape(len(target), inputs, multiplier)


def _best_depthwise(target: Tensor, moment: Tensor, pointwise: Tensor, shape: torch.Size) -> Tensor:
    """Normal equations: entry (i, m, k) meets (j, n, l) with `P_im . P_jn` times the moment of (i, k) and (j, l)."""
    inputs, multiplier, places = shape
    by_place = moment.reshape(inputs, places, inputs, places)
    gram = torch.einsum("oim,ojn->imjn", pointwise, pointwise)
    size = inputs * multiplier * places
    system = torch.einsum("imjn,ikjl->imkjnl", gram, by_place).reshape(size, size)
    wanted = torch.einsum("oim,oik->imk", pointwise, (target.flatten(1) @ moment).reshape(target.shape))
    system.diagonal().add_(RIDGE * system.diagonal().mean().clamp_min(1e-30))
    return torch.linalg.solve(system, wanted.reshape(-1)).reshape(shape)
