"""Grids for the rows of a matrix, one scale per group of neighbours: where they may lie, and how they are chosen.

A matrix is [rows, columns]; every `group` columns of a row share a scale, so scales are [rows, groups].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

LEAST = 2.0**-24  # the smallest magnitude that float16 holds
TINY = 2.0**-100  # the scale of a group of zeros
# NormalFloat with 4 bits: quantiles of the Gaussian, 0 among them. QLoRA, arXiv:2305.14314, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Where weights may lie: `(integer - zero) * scale` for integers from `low` to `high`, or `table[index] * scale`.

    `scale` is [rows, groups]; `zero` is [rows, groups] or a scalar; `table` (ascending, may be None) has the values of
    the integers 0 to `high`. Scales may be negative.
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int
    group: int
    table: Tensor | None = None
    whole: bool = True  # zero points are integers
    half: bool = True  # scales (and zero points that are no integers) are stored in float16, else in float32

    @property
    def dtype(self) -> torch.dtype:
        """The type in which its integers are kept."""
        return torch.int8 if self.low < 0 else torch.uint8

    def round(self, values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The integers (as floats) whose points lie nearest to `values`; `scale` and `zero` broadcast against it."""
        if self.table is None:
            return torch.round(values / scale + zero).clamp_(self.low, self.high)
        middles = (self.table[1:] + self.table[:-1]) / 2
        return torch.bucketize(values / scale, middles).to(values.dtype)

    def value(self, integers: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The points that integers (as floats) stand for."""
        return self.unit(integers, zero) * scale

    def unit(self, integers: Tensor, zero: Tensor) -> Tensor:
        """The points in units of the scale."""
        return integers - zero if self.table is None else self.table[integers.long()]

    def origin(self, zero: Tensor) -> Tensor:
        """The integers (as floats) that stand for 0, where the grid has it; shaped as `zero`."""
        return zero if self.table is None else torch.full_like(zero, float(self.table.abs().argmin()))

    def zeros(self) -> Tensor:
        """The zero points as [rows, groups]."""
        return self.zero.expand_as(self.scale)

    def nearest(self, weight: Tensor) -> Tensor:
        """The integers nearest to `weight` [rows, columns], in `dtype`."""
        grouped = weight.reshape(*self.scale.shape, self.group)
        return self.round(grouped, self.scale[..., None], self.zeros()[..., None]).reshape(weight.shape).to(self.dtype)

    def points(self, integers: Tensor) -> Tensor:
        """The weights that integers [rows, columns] stand for."""
        grouped = integers.reshape(*self.scale.shape, self.group)
        return self.value(grouped, self.scale[..., None], self.zeros()[..., None]).reshape(integers.shape)

    def fitting(self) -> Grid:
        """The grid, stored in float32 if its scales lie where float16 is coarse or ends."""
        largest = float(self.scale.abs().max())
        return replace(self, half=2.0**-14 < largest < 2.0**15)

    def stored(self) -> Grid:
        """The grid with its scales (and zero points that are no integers) rounded as they are stored."""
        if not self.half:
            return self
        sign = torch.where(self.scale < 0, -1.0, 1.0).to(self.scale.dtype)
        magnitude = self.scale.abs().clamp(LEAST, 65504).half().to(self.scale.dtype)
        zero = self.zero if self.whole else self.zero.half().to(self.zero.dtype)
        return replace(self, scale=sign * magnitude, zero=zero)


def affine_by_range(weight: Tensor, group: int, bits: int) -> Grid:
    """The affine grid over the range of each group, 0 included: nothing is cut off, 0 is exact (arXiv:1712.05877)."""
    grouped = _grouped(weight, group)
    return _affine(grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), 2**bits - 1, group)


def _affine(low: Tensor, high: Tensor, top: int, group: int) -> Grid:
    scale = ((high - low) / top).clamp_min(TINY)
    return Grid(scale, torch.round(-low / scale).clamp(0, top), 0, top, group)


def symmetric_by_range(weight: Tensor, group: int, bits: int) -> Grid:
    """The grid of whole steps around 0 whose lowest integer is the largest magnitude of each group.

    The range -2**(bits-1) to 2**(bits-1)-1 has one integer more on the side of the scale's sign, and the largest
    weight lies there.
    """
    grouped = _grouped(weight, group)
    low = -(2 ** (bits - 1))
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))[..., 0]
    scale = torch.where(largest == 0, TINY, largest / low)
    return Grid(scale, torch.zeros((), dtype=scale.dtype), low, -low - 1, group)


def centred_by_range(weight: Tensor, group: int, bits: int) -> Grid:
    """The grid of half steps around 0 (2 bits: -1.5, -0.5, 0.5, 1.5): no point is spent on 0. One bit is the sign."""
    top = 2**bits - 1
    scale = (_grouped(weight, group).abs().amax(-1) / (top / 2)).clamp_min(TINY)
    return Grid(scale, torch.tensor(top / 2, dtype=scale.dtype), 0, top, group, whole=False)


def ternary_by_range(weight: Tensor, group: int) -> Grid:
    """The grid -1, 0, 1 times the largest magnitude of each group (arXiv:1605.04711)."""
    scale = _grouped(weight, group).abs().amax(-1).clamp_min(TINY)
    return Grid(scale, torch.zeros((), dtype=scale.dtype), -1, 1, group)


def table_by_range(weight: Tensor, group: int, table: tuple[float, ...]) -> Grid:
    """The points of `table` (ascending, within -1...1) times the largest magnitude of each group."""
    scale = _grouped(weight, group).abs().amax(-1).clamp_min(TINY)
    points = torch.tensor(table, dtype=scale.dtype)
    return Grid(scale, torch.zeros((), dtype=scale.dtype), 0, len(table) - 1, group, points)


def _grouped(weight: Tensor, group: int) -> Tensor:
    return weight.reshape(len(weight), -1, group)


def clipped(weight: Tensor, grid: Grid, importance: Tensor | None = None, candidates: int = 40) -> Grid:
    """The grid of least squared error, weighted by `importance` [columns], of those that `shrunk` gives.

    Cutting off a few large weights makes the grid finer for all others (arXiv:1902.06822; weighting after
    arXiv:2306.00978). The error never exceeds that of `grid`. Rows are gone through in parts that fit a cache.
    """
    if importance is None:
        importance = torch.ones(weight.shape[1], dtype=weight.dtype)
    rows = max(1, 2**16 // weight.shape[1])
    parts = []
    for start in range(0, len(weight), rows):
        part = replace(grid, scale=grid.scale[start : start + rows], zero=_rows(grid.zero, start, rows))
        parts.append(_clipped(weight[start : start + rows], part, importance, candidates))
    scale = torch.cat([part.scale for part in parts])
    return replace(grid, scale=scale, zero=grid.zero if grid.zero.dim() == 0 else torch.cat([p.zero for p in parts]))


def _rows(zero: Tensor, start: int, count: int) -> Tensor:
    return zero if zero.dim() == 0 else zero[start : start + count]


def _clipped(weight: Tensor, grid: Grid, importance: Tensor, candidates: int) -> Grid:
    best, least = grid, grouped_error(weight, grid, importance)
    for other in shrunk(weight, grid, candidates):
        error = grouped_error(weight, other, importance)
        better = error < least
        least = torch.where(better, error, least)
        zero = grid.zero if grid.zero.dim() == 0 else torch.where(better, other.zero, best.zero)
        best = replace(grid, scale=torch.where(better, other.scale, best.scale), zero=zero)
    return best


def rescaled(weight: Tensor, grid: Grid, importance: Tensor | None = None, rounds: int = 3) -> Grid:
    """The grid with the scales of least squared error, weighted by `importance` [columns], for the nearest integers.

    Rounding and fitting take turns, `rounds` times; each group gets its best scale, so the error does not rise.
    """
    if importance is None:
        importance = torch.ones(weight.shape[1], dtype=weight.dtype)
    grouped, shares = _grouped(weight, grid.group), importance.reshape(1, -1, grid.group)
    best, least, now = grid, grouped_error(weight, grid, importance), grid
    for _ in range(rounds):
        scale, zero = now.scale[..., None], now.zeros()[..., None]
        points = now.unit(now.round(grouped, scale, zero), zero)
        size = (shares * points.square()).sum(-1)
        found = (shares * points * grouped).sum(-1) / size.clamp_min(TINY)
        now = replace(grid, scale=torch.where(found * now.scale > 0, found, now.scale)).stored()
        error = grouped_error(weight, now, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = replace(grid, scale=torch.where(better, now.scale, best.scale))
    return best


def grouped_error(weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """The squared error of rounding to nearest, summed over groups with the weights `importance`: [rows, groups]."""
    grouped, scale, zero = _grouped(weight, grid.group), grid.scale[..., None], grid.zeros()[..., None]
    difference = grid.value(grid.round(grouped, scale, zero), scale, zero).sub_(grouped)
    return difference.square_().mul_(importance.reshape(1, -1, grid.group)).sum(-1)


def shrunk(weight: Tensor, grid: Grid, candidates: int) -> Iterator[Grid]:
    """Grids of the same kind with scales from 1 down to 0.3 times those of `grid` (few bits) or 0.6 (from 4 bits on).

    A zero point of integers is chosen anew: all of them with up to 3 bits, else the one that keeps the range's place.
    A grid with more room on one side is tried both ways round.
    """
    levels = grid.high - grid.low + 1
    for share in torch.linspace(1.0, 0.3 if levels < 16 else 0.6, candidates).tolist():
        scale = grid.scale * share
        if grid.table is not None or grid.zero.dim() == 0:
            yield replace(grid, scale=scale)
            if grid.low + grid.high == -1:
                yield replace(grid, scale=-scale)
        elif levels <= 8:
            for zero in range(levels):
                yield replace(grid, scale=scale, zero=torch.full_like(grid.zero, zero))
        else:
            grouped = _grouped(weight, grid.group)
            low, high = grouped.amin(-1).clamp(max=0) * share, grouped.amax(-1).clamp(min=0) * share
            yield _affine(low, high, grid.high, grid.group)
