"""Half-quadratic quantization: zero points of least robust error, without data. Badri and Shaji 2023,
https://mobiusml.github.io/hqq_blog.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .grids import Grid


def shrink(values: Tensor, beta: float, power: float) -> Tensor:
    """The proximal step of the `power`-norm (below 1): every magnitude m becomes max(0, m - m**(power-1) / beta)."""
    size = values.abs()
    return torch.sign(values) * torch.relu(size - size.clamp_min(1e-12).pow(power - 1) / beta)


def half_quadratic(
    weight: Tensor, grid: Grid, power: float = 0.7, beta: float = 10.0, growth: float = 1.01, turns: int = 20
) -> Grid:
    """`grid` with zero points (floats) that lessen the `power`-norm of the error of rounding `weight` [rows, columns].

    In turns the error is split into a few large outliers (`shrink`) and a rest, and each zero point moves to where the
    rest has mean zero; the scales stay. Ends early when the mean absolute error stops falling; the best zero points
    are given, so the error never exceeds that of `grid`.
    """
    grouped = weight.reshape(*grid.scale.shape, grid.group)
    scale, zero = grid.scale[..., None], grid.zeros()[..., None].clone()
    best, least = zero, float("inf")
    for turn in range(turns + 1):
        integers = grid.round(grouped, scale, zero)
        points = grid.value(integers, scale, zero)
        error = float((grouped - points).abs().mean())
        if error >= least:
            break
        best, least = zero, error
        if turn < turns:
            outliers = shrink(grouped - points, beta, power)
            zero = (integers - (grouped - outliers) / scale).mean(-1, keepdim=True)
            beta *= growth
    return replace(grid, zero=best[..., 0], whole=False)
