"""GPTQ: rounding column by column so that later columns make up for what earlier ones lost. Pure functions.

The loss of a rounded matrix is `tr(E H E^T)` with E = weight - rounded [rows, columns] and H the second moment of the
layer's inputs [columns, columns].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from featherweight.model.feedback import damped as damped
from featherweight.model.feedback import factors as factors

from .grids import Grid


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """`tr(E H E^T)`: the squared error of the layer's outputs, summed over its rows."""
    error = weight - rounded
    return float(((error @ hessian) * error).sum())


def sorted_order(hessian: Tensor, steps: int = 0) -> Tensor:
    """The order in which to round the columns, so that the d of `factors` come out even and their sum small.

    Found from its end: the column that comes last has the smallest input, the one before it the smallest part that the
    inputs after it do not explain, and so on: sorted QR (Wuebben et al., Electronics Letters 37, 2001). After `steps`
    columns the others follow by that part as it is then. With no steps it is GPTQ's order by size of input, which is as
    good where no column is explained by the others, and worse where all are: with fewer inputs than columns.
    """
    rest, columns = hessian.diagonal().clone(), len(hessian)
    last: list[int] = []
    explained = hessian.new_empty(columns, min(steps, columns))
    for step in range(explained.shape[1]):
        place = int(rest.argmin())
        known = explained[:, :step]
        found = torch.addmv(hessian[place], known, known[place], alpha=-1)
        explained[:, step] = found.div_(rest[place].clamp_min(1e-30).sqrt())
        rest.addcmul_(explained[:, step], explained[:, step], value=-1)
        rest[place] = torch.inf
        last.append(place)
    others = torch.argsort(rest, descending=True, stable=True)[len(last) :]
    return torch.cat([others, torch.tensor(last[::-1], dtype=others.dtype, device=others.device)])


def in_order(
    weight: Tensor, grid: Grid, unit: Tensor, order: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The integers (int8 or uint8, [rows, columns]) of columns rounded in `order`, each after what earlier ones left.

    `unit` is U of `factors` for the Hessian in that order. Where `keep` is False the weight becomes 0 (the grid must
    have it) and the others make up for it. Columns are gone through in blocks, so that most of the work is products of
    matrices. Also gives E U, [columns in order, rows]: what is left of each column once the others have made up.
    """
    columns = weight.t().contiguous()[order]
    holes = None if keep is None else ~keep.t()[order]
    scale, zero = grid.scale.t().contiguous(), grid.zeros().t().contiguous()
    error = torch.zeros_like(columns)
    found = torch.empty_like(columns, dtype=grid.dtype)
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
            value = grid.value(integers, scale[place], zero[place])
            torch.sub(columns[column], value, out=error[column])
            torch.sub(target, value, out=columns[column])
    return found[torch.argsort(order)].t().contiguous(), columns


def best_of(
    weight: Tensor,
    grid: Grid,
    unit: Tensor,
    cost: Tensor,
    order: Tensor,
    width: int,
    keep: Tensor | None = None,
) -> Tensor:
    """`in_order` with the `width` best beginnings of each row kept, each with two integers to go on: the M-algorithm.

    `cost` is d of `factors`. The loss is at most that of the best beginning that was never dropped; with width 1 it is
    `in_order`'s. After K-best decoding of lattices (arXiv:1203.3705 surveys it).
    """
    rows = max(1, 2**23 // (2 * width * weight.shape[1]))
    parts = []
    for start in range(0, len(weight), rows):
        zero = grid.zeros()[start : start + rows]
        part = replace(grid, scale=grid.scale[start : start + rows], zero=zero)
        holes = None if keep is None else ~keep[start : start + rows, order]
        parts.append(_best_of(weight[start : start + rows], part, unit, cost, order, width, holes))
    return torch.cat(parts)


def _best_of(
    weight: Tensor, grid: Grid, unit: Tensor, cost: Tensor, order: Tensor, width: int, holes: Tensor | None
) -> Tensor:
    """Columns are gone through in blocks: what was decided before a block is reordered once, at the block's end."""
    count, columns = weight.shape
    weight, places = weight[:, order], (order // grid.group).tolist()
    error, found = weight.new_zeros(count, 1, columns), weight.new_zeros(count, 1, columns, dtype=grid.dtype)
    total = weight.new_zeros(count, 1)
    for start in range(0, columns, 32):
        end = min(start + 32, columns)
        given = weight[:, None, start:end] + error[:, :, :start] @ unit[:start, start:end]
        origin = torch.arange(total.shape[1]).expand_as(total)
        lost, chosen = torch.zeros_like(given), torch.zeros_like(given, dtype=grid.dtype)
        for place, column in enumerate(range(start, end)):
            scale, zero = (entry[:, places[column], None] for entry in (grid.scale, grid.zero))
            target = given[:, :, place] + lost[:, :, :place] @ unit[start:column, column]
            choices = two_nearest(target, grid, scale, zero)
            if holes is not None:
                choices = torch.where(holes[:, column, None, None], grid.origin(zero)[..., None], choices)
            values = grid.value(choices, scale[..., None], zero[..., None])
            totals = torch.addcmul(total[..., None], cost[column], (target[..., None] - values).square_())
            if holes is not None:  # there is but one way to go on
                totals[..., 1].masked_fill_(holes[:, column, None], torch.inf)
            total, picked = totals.flatten(1).topk(min(width, 2 * total.shape[1]), 1, largest=False)
            parent = picked // 2
            origin = origin.gather(1, parent)
            given, lost, chosen = (_reordered(past, parent) for past in (given, lost, chosen))
            chosen[:, :, place] = choices.flatten(1).gather(1, picked).to(grid.dtype)
            lost[:, :, place] = weight[:, column, None] - values.flatten(1).gather(1, picked)
        error, found = _reordered(error, origin), _reordered(found, origin)
        error[:, :, start:end], found[:, :, start:end] = lost, chosen
    result = torch.empty_like(weight, dtype=grid.dtype)
    result[:, order] = found[:, 0]
    return result


def _reordered(past: Tensor, parent: Tensor) -> Tensor:
    """The beginnings [rows, width, columns] that `parent` [rows, width] goes on from."""
    return past.gather(1, parent[..., None].expand(-1, -1, past.shape[2]))


def two_nearest(target: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest integer and the one beside it on the side of `target`, stacked last; at an end, the one before it."""
    nearest = grid.round(target, scale, zero)
    beyond = (target - grid.value(nearest, scale, zero)) * torch.sign(scale) > 0
    second = nearest + torch.where(beyond, 1.0, -1.0)
    outside = (second < grid.low) | (second > grid.high)
    return torch.stack([nearest, torch.where(outside, 2 * nearest - second, second)], -1)


def sloped(left: Tensor, unit: Tensor, cost: Tensor, order: Tensor) -> Tensor:
    """`E H` [rows, columns] from E U in order [columns, rows], at half the price: H is U diag(d) U^T, U triangular."""
    weighted, found = left * cost[:, None], torch.empty_like(left)
    for start in range(0, len(unit), 512):
        cut = slice(start, start + 512)
        found[cut] = unit[cut, start:] @ weighted[start:]
    return found[torch.argsort(order)].t()


Slope = Callable[[slice, Tensor], Tensor]  # E H of some rows, from which rows they are and their E


def refitted(
    weight: Tensor, grid: Grid, integers: Tensor, hessian: Tensor, slope: Slope | None = None
) -> tuple[Grid, Tensor, Tensor]:
    """The grid with the scales of least loss for these integers, and the loss of each row [rows] before and after.

    One linear system for each row, solved exactly; scales come as they are stored. Rows whose loss does not fall keep
    theirs.
    """
    rows = max(1, 2**21 // weight.shape[1])
    parts = []
    for start in range(0, len(weight), rows):
        cut = slice(start, start + rows)
        part = replace(grid, scale=grid.scale[cut], zero=grid.zeros()[cut])
        points = part.unit(integers[cut].to(weight.dtype).reshape(*part.scale.shape, grid.group), part.zero[..., None])
        error = weight[cut] - (points * part.scale[..., None]).flatten(1)
        parts.append(_refitted(points, part, error, error @ hessian if slope is None else slope(cut, error), hessian))
    scale, before, after = (torch.cat(entries) for entries in zip(*parts))
    return replace(grid, scale=scale), before, after


def _refitted(points: Tensor, grid: Grid, error: Tensor, slope: Tensor, hessian: Tensor) -> tuple[Tensor, ...]:
    before = (slope * error).sum(1)
    right = (slope.reshape(points.shape) * points).sum(-1)
    system = curvature(points, hessian)
    ridge = 1e-6 * system.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)
    damped_system = system + torch.diag_embed(ridge[:, None].expand_as(right))
    scale = grid.scale + torch.linalg.solve(damped_system, right)
    usable = torch.isfinite(scale) & (scale.abs() > 1e-3 * grid.scale.abs())
    scale = replace(grid, scale=torch.where(usable, scale, grid.scale)).stored().scale
    step = scale - grid.scale
    after = before - 2 * (step * right).sum(1) + torch.einsum("ra,rab,rb->r", step, system, step)
    better = after < before
    return torch.where(better[:, None], scale, grid.scale), before, torch.where(better, after, before)


def curvature(points: Tensor, hessian: Tensor) -> Tensor:
    """The loss's second derivative by the scales of each row, [rows, groups, groups], for points [rows, groups, group].

    It is symmetric: each pair of groups is gone through once.
    """
    rows, count, group = points.shape
    found = points.new_empty(rows, count, count)
    for place in range(count):
        behind = place * group
        product = points[:, place] @ hessian[behind : behind + group, behind:]
        shared = product.reshape(rows, -1, group).mul_(points[:, place:]).sum(-1)
        found[:, place, place:] = shared
        found[:, place:, place] = shared
    return found


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

    `rounds` times the scales are fitted to the integers, and the integers rounded anew in between; each row gets its
    pair of least loss. `known` is `factors` of the Hessian in `order`, where they are at hand.
    """
    found = known or factors(hessian[order][:, order])
    if found is None:
        return None
    unit, cost = found

    def rounded(grid: Grid) -> tuple[Tensor, Slope | None]:
        if width > 1:
            return best_of(weight, grid, unit, cost, order, width, keep), None
        integers, left = in_order(weight, grid, unit, order, keep)
        return integers, lambda rows, _error: sloped(left[:, rows], unit, cost, order)

    integers, slope = rounded(grid)
    if not rounds:
        return integers, grid
    fitted, _, least = refitted(weight, grid, integers, hessian, slope)
    best = fitted
    for _ in range(rounds - 1):
        again, slope = rounded(fitted)
        fitted, _, now = refitted(weight, fitted, again, hessian, slope)
        better = (now < least)[:, None]
        integers = torch.where(better, again, integers)
        best = replace(best, scale=torch.where(better, fitted.scale, best.scale))
        least = torch.minimum(now, least)
    return integers, best
