"""GPTQ: rounding column by column so that later columns make up for what earlier ones lost. Pure functions.

The loss of a rounded matrix is `tr(E H E^T)` with E = weight - rounded [rows, columns] and H the second moment of the
layer's inputs [columns, columns].
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .grids import Grid


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """`tr(E H E^T)`: the squared error of the layer's outputs, summed over its rows."""
    error = weight - rounded
    return float(((error @ hessian) * error).sum())


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


def activation_order(hessian: Tensor) -> Tensor:
    """The columns from the largest input to the smallest: what can be made up for least comes first."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def in_order(weight: Tensor, grid: Grid, unit: Tensor, order: Tensor, keep: Tensor | None = None) -> Tensor:
    """The integers (floats, [rows, columns]) of columns rounded in `order`, each after what the earlier ones left.

    `unit` is U of `factors` for the Hessian in that order. Where `keep` is False the weight becomes 0 (the grid must
    have it) and the others make up for it. Columns are gone through in blocks, so that most of the work is products of
    matrices.
    """
    columns = weight.t().contiguous()[order]
    holes = None if keep is None else ~keep.t()[order]
    scale, zero = grid.scale.t().contiguous(), grid.zeros().t().contiguous()
    error = torch.zeros_like(columns)
    found = torch.empty_like(columns, dtype=torch.int8 if grid.low < 0 else torch.uint8)
    places = (order // grid.group).tolist()
    for start in range(0, len(columns), 64):
        end = min(start + 64, len(columns))
        given = columns[start:end] + unit[:start, start:end].t() @ error[:start]
        for column in range(start, end):
            target, place = given[column - start], places[column]
            if column > start:
                target = torch.addmv(target, error[start:column].t(), unit[start:column, column])
            integers = grid.round(target, scale[place], zero[place])
            if holes is not None:
                integers = torch.where(holes[column], grid.origin(zero[place]), integers)
            found[column] = integers
            torch.sub(columns[column], grid.value(integers, scale[place], zero[place]), out=error[column])
    del columns, error
    return found[torch.argsort(order)].t().to(weight.dtype, memory_format=torch.contiguous_format)


def best_of(weight: Tensor, grid: Grid, unit: Tensor, cost: Tensor, order: Tensor, width: int) -> Tensor:
    """`in_order` with the `width` best beginnings of each row kept, each with two integers to go on: the M-algorithm.

    `cost` is d of `factors`. The loss is at most that of the best beginning that was never dropped; with width 1 it is
    `in_order`'s. After K-best decoding of lattices (arXiv:1203.3705 surveys it).
    """
    rows = max(1, 2**23 // (2 * width * weight.shape[1]))
    parts = []
    for start in range(0, len(weight), rows):
        zero = grid.zeros()[start : start + rows]
        part = replace(grid, scale=grid.scale[start : start + rows], zero=zero)
        parts.append(_best_of(weight[start : start + rows], part, unit, cost, order, width))
    return torch.cat(parts)


def _best_of(weight: Tensor, grid: Grid, unit: Tensor, cost: Tensor, order: Tensor, width: int) -> Tensor:
    count = len(weight)
    weight, places = weight[:, order], (order // grid.group).tolist()
    error, found = weight.new_zeros(count, 1, len(order)), weight.new_zeros(count, 1, len(order))
    total = weight.new_zeros(count, 1)
    for column in range(len(order)):
        scale, zero = (entry[:, places[column], None] for entry in (grid.scale, grid.zero))
        target = weight[:, column, None] + error[:, :, :column] @ unit[:column, column]
        choices = two_nearest(target, grid, scale, zero)
        values = grid.value(choices, scale[..., None], zero[..., None])
        totals = total[..., None] + cost[column] * (target[..., None] - values) ** 2
        total, picked = totals.flatten(1).topk(min(width, 2 * total.shape[1]), 1, largest=False)
        origin = (picked // 2)[..., None]
        error, found = (past.gather(1, origin.expand(-1, -1, len(order))) for past in (error, found))
        found[:, :, column] = choices.flatten(1).gather(1, picked)
        error[:, :, column] = weight[:, column, None] - values.flatten(1).gather(1, picked)
    result = torch.empty_like(weight)
    result[:, order] = found[:, 0]
    return result


def two_nearest(target: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest integer and the one beside it on the side of `target`, stacked last; at an end, the one before it."""
    nearest = grid.round(target, scale, zero)
    beyond = (target - grid.value(nearest, scale, zero)) * torch.sign(scale) > 0
    second = nearest + torch.where(beyond, 1.0, -1.0)
    outside = (second < grid.low) | (second > grid.high)
    return torch.stack([nearest, torch.where(outside, 2 * nearest - second, second)], -1)


def refitted(weight: Tensor, grid: Grid, integers: Tensor, hessian: Tensor) -> Grid:
    """The same grid with the scales of least loss for these integers: one linear system for each row, solved exactly.

    A scale that would turn out as 0 or not finite stays as it was.
    """
    count = grid.scale.shape[1]
    rows = max(1, 2**24 // (weight.shape[1] * count))
    blocks = hessian.reshape(count, grid.group, count, grid.group)
    wanted, parts = weight @ hessian, []
    for start in range(0, len(weight), rows):
        cut = slice(start, start + rows)
        points = grid.unit(integers[cut].reshape(-1, count, grid.group), grid.zeros()[cut][..., None])
        system = torch.einsum("raby,rby->rab", torch.einsum("rax,axby->raby", points, blocks), points)
        right = (points * wanted[cut].reshape(points.shape)).sum(-1)
        ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
        system.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        parts.append(torch.linalg.solve(system, right))
    scale = torch.cat(parts)
    usable = torch.isfinite(scale) & (scale.abs() > 1e-3 * grid.scale.abs())
    return replace(grid, scale=torch.where(usable, scale, grid.scale))


def gptq(
    weight: Tensor,
    grid: Grid,
    hessian: Tensor,
    order: Tensor,
    keep: Tensor | None = None,
    width: int = 1,
    rounds: int = 0,
    known: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Grid] | None:
    """Integers [rows, columns] and their grid; None if `hessian` is not positive definite.

    After the first rounding, `rounds` times the scales are fitted to the integers and the integers rounded anew; the
    pair of least loss is given. `known` is `factors` of the Hessian in `order`, where they are at hand.
    """
    found = known or factors(hessian[order][:, order])
    if found is None:
        return None
    unit, cost = found
    best: tuple[float, Tensor, Grid] | None = None
    for _ in range(rounds + 1):
        if width > 1 and keep is None:
            integers = best_of(weight, grid, unit, cost, order, width)
        else:
            integers = in_order(weight, grid, unit, order, keep)
        if not rounds:
            return integers, grid
        fitted = refitted(weight, grid, integers, hessian).stored()
        for each in (grid, fitted):
            now = loss(weight, each.points(integers), hessian)
            if best is None or now < best[0]:
                best = (now, integers, each)
        grid = fitted
    assert best is not None
    return best[1], best[2]
