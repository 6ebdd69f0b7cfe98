"""Rounding a weight to a grid so that later columns make up for what earlier ones lost. Pure functions.

The loss of a rounded matrix is `tr(E H E^T)` with E = weight - rounded [rows, columns] and H the second moment of the
layer's inputs [columns, columns].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.encoding import Affine, spread

DAMPING = 0.01  # share of the mean diagonal that is added to the Hessian
SWEEPS = 4  # over all columns, each time with all others as they are


def damped(hessian: Tensor, damping: float) -> Tensor:
    """The Hessian with `damping` times its mean diagonal added to the diagonal."""
    found = hessian.clone()
    found.diagonal().add_(damping * float(hessian.diagonal().mean()))
    return found


def factors(hessian: Tensor) -> tuple[Tensor, Tensor] | None:
    """`H = U diag(d) U^T` with U unit upper triangular: U and d; None if H is not positive definite to rounding.

    Rounding in order then needs neither inverse nor updates of the weights: the loss is the sum of `d[i]` times the
    squared rounding error of column i, once `E U` above the diagonal was added to it (LDLQ, arXiv:2307.13304, which is
    GPTQ, arXiv:2210.17323; Babai's nearest plane, arXiv:2507.18553).
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    upper = lower.flip(0, 1)
    roots = upper.diagonal().clone()
    largest = roots.max()
    if int(failed) or not bool(torch.isfinite(roots).all()) or float(roots.min()) <= 1e-5 * float(largest):
        return None
    return upper.div_(roots), roots.square()


@dataclass(frozen=True)
class _Points:
    """The grid of every entry of a matrix [rows, columns]: its scale and zero point, the lowest and highest integer."""

    scale: Tensor
    zero: Tensor
    low: int
    high: int

    def nearest(self, values: Tensor, columns: Tensor | slice) -> Tensor:
        steps = values / self.scale[:, columns] + self.zero[:, columns]
        return steps.round().clamp(self.low, self.high)

    def value(self, integers: Tensor, columns: Tensor | slice) -> Tensor:
        return (integers - self.zero[:, columns]) * self.scale[:, columns]


@torch.no_grad()
def rerounded(stored: Affine, weight: Tensor, hessian: Tensor | None, gain: Tensor | None = None) -> Affine:
    """`weight` [rows, columns] on the grid that `stored` (along axis 0, or one scale for all) has, or on one near it.

    With `hessian` columns are rounded one after the other, each after what earlier ones left, and then gone through
    again with all others as they are; without, each entry goes to its nearest point. Each row takes, of the grid as it
    is and the grid widened to the weight's new range, the one with the smaller loss. `gain` [rows], above 0, says by
    what the rows were multiplied: their scales are multiplied first.
    """
    along = _multiplied(stored, gain)
    if hessian is None:
        points = _points(along)
        return _with(along, points.nearest(weight, slice(None)))
    curve = damped(hessian.to(weight.dtype), DAMPING)
    best, least = along, torch.full_like(weight[:, 0], torch.inf)
    chosen = torch.zeros_like(weight)
    for grid in (along, _widened(along, weight)):
        integers = _swept(weight, _points(grid), curve)
        error = weight - _points(grid).value(integers, slice(None))
        loss = ((error @ curve) * error).sum(1)
        better = loss < least
        chosen = torch.where(better[:, None], integers, chosen)
        best = _by_row(best, grid, better)
        least = torch.minimum(loss, least)
    return _with(best, chosen)


def _swept(weight: Tensor, points: _Points, hessian: Tensor) -> Tensor:
    """Integers of small loss: in order with feedback, then by coordinate descent."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    found = factors(hessian[order][:, order])
    integers = points.nearest(weight, slice(None))
    if found is not None:
        unit, error = found[0], torch.zeros_like(weight)
        for place, column in enumerate(order.tolist()):
            behind = order[:place]
            target = weight[:, column] + error[:, behind] @ unit[:place, place]
            one = order[place : place + 1]
            integers[:, column] = points.nearest(target[:, None], one)[:, 0]
            error[:, column] = weight[:, column] - points.value(integers[:, one], one)[:, 0]
    slope = (weight - points.value(integers, slice(None))) @ hessian
    for _ in range(SWEEPS):
        moved = False
        for column in order.tolist():
            one = order.new_tensor([column])
            now = points.value(integers[:, one], one)
            wanted = points.nearest(now + slope[:, one] / hessian[column, column], one)
            step = points.value(wanted, one) - now
            if bool(step.any()):
                moved = True
                integers[:, one] = wanted
                slope -= step * hessian[column]
        if not moved:
            break
    return integers


def _points(stored: Affine) -> _Points:
    scale = spread(stored.scale.float(), stored.values, stored.axis, stored.group).expand(stored.shape)
    zero = spread(stored.zero.float(), stored.values, stored.axis, stored.group).expand(stored.shape)
    if not stored.values.dtype.is_signed:
        return _Points(scale, zero, 0, 2**stored.bits - 1)
    high = 2 ** (stored.bits - 1) - 1
    return _Points(scale, zero, min(-high, int(stored.values.min())), high)


def _multiplied(stored: Affine, gain: Tensor | None) -> Affine:
    """The grid with its scales multiplied by a factor for each row, where it has one for each row at all."""
    if gain is None or stored.axis != 0 or not bool((gain > 0).all()):
        return stored
    factor = gain if stored.scale.dim() == 1 else gain[:, None]
    return replace(stored, scale=(stored.scale.float() * factor).to(stored.scale.dtype))


def _widened(stored: Affine, weight: Tensor) -> Affine:
    """The grid with each scale multiplied by how far its weights reach now over how far they reached."""
    if stored.axis is None:
        return stored
    before, now = stored.decode().abs(), weight.abs()
    if stored.group is not None:
        before, now = (part.reshape(*stored.scale.shape, stored.group) for part in (before, now))
    ratio = (now.amax(-1) / before.amax(-1).clamp_min(1e-12)).clamp(0.5, 2.0)
    return replace(stored, scale=(stored.scale.float() * ratio).to(stored.scale.dtype))


def _by_row(one: Affine, other: Affine, better: Tensor) -> Affine:
    """Of two grids that differ in their scales, for each row the second where that is better."""
    if one.axis is None:
        return one
    mask = better if one.scale.dim() == 1 else better[:, None]
    return replace(one, scale=torch.where(mask, other.scale, one.scale))


def _with(grid: Affine, integers: Tensor) -> Affine:
    return replace(grid, values=integers.to(grid.values.dtype))
