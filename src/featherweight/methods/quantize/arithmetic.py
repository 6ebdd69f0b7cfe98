"""The mathematics of affine quantization: scales and zero points from weights and ranges."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.encoding import spread
from ...model.rounding import limits

TINY = torch.finfo(torch.float32).tiny


def largest(weight: Tensor, axis: int | None) -> Tensor:
    """The largest magnitude in `weight`, or one per index of `axis`."""
    magnitude = weight.detach().float().abs()
    return magnitude.amax() if axis is None else magnitude.movedim(axis, 0).flatten(1).amax(1)


def scale_by_max(weight: Tensor, axis: int | None, bits: int = 8) -> Tensor:
    """The smallest symmetric scales that cut off nothing: largest magnitude over highest integer (arXiv:1806.08342).

    Scalar (`axis` None) or one per index of `axis`. A channel of zeros gets the scale of the largest channel: any scale
    stores it exactly, and this one keeps a bias in units of `input scale * weight scale` within 32 bits.
    """
    reach = largest(weight, axis)
    top = reach.amax()
    reach = torch.where(reach > 0, reach, torch.where(top > 0, top, torch.ones_like(top)))
    return (reach / limits(bits)[1]).clamp_min(TINY)


def rounding_error(weight: Tensor, scale: Tensor, axis: int | None, bits: int = 8) -> Tensor:
    """Mean squared difference between `weight` and its symmetric quantization: scalar, or one per index of `axis`."""
    low, high = limits(bits)
    weight = weight.detach().float()
    step = spread(scale, weight, axis)
    squares = (torch.round(weight / step).clamp(low, high) * step - weight) ** 2
    return squares.mean() if axis is None else squares.movedim(axis, 0).flatten(1).mean(1)


def scale_by_error(weight: Tensor, axis: int | None, bits: int = 8, candidates: int = 60, least: float = 0.4) -> Tensor:
    """The symmetric scales of least mean squared error, searched below `scale_by_max` (arXiv:1902.06822).

    Cutting off a few large weights makes the grid finer for all others. Each channel is searched by itself in
    `candidates` equal steps from 1 down to `least` times the full scale, so the error never exceeds `scale_by_max`'s.
    """
    full = scale_by_max(weight, axis, bits)
    best, error = full, rounding_error(weight, full, axis, bits)
    for share in torch.linspace(1.0, least, candidates).tolist()[1:]:
        scale = (full * share).clamp_min(TINY)
        found = rounding_error(weight, scale, axis, bits)
        best, error = torch.where(found < error, scale, best), torch.minimum(found, error)
    return best


def affine_of_range(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point of an unsigned grid over low...high, widened so that 0 is on it (arXiv:1712.05877).

    Zero must be exact because padding and ReLU make zeros. Raises `ValueError` if the range is not finite or empty.
    """
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{low}...{high} is no finite range")
    low, high = min(low, 0.0), max(high, 0.0)
    top = limits(bits, signed=False)[1]
    scale = (high - low) / top
    return (scale, max(0, min(top, round(-low / scale)))) if scale >= TINY else (1.0, 0)


def symmetric_of_range(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Scale and zero point of an unsigned grid whose zero is in the middle and which reaches as far as low...high does
    from 0, or begins at zero where nothing lies below (arXiv:1806.08342, section 2.2).

    Raises `ValueError` if the range is not finite or empty.
    """
    if not low < 0:
        return affine_of_range(low, high, bits)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"{low}...{high} is no finite range")
    scale = max(-low, high, 0.0) / limits(bits)[1]
    return scale if scale >= TINY else 1.0, 2 ** (bits - 1)
