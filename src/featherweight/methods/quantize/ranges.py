"""Ranges of activations from calibration data: pure functions on histograms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Calibration = Literal["minmax", "percentile", "mse", "entropy"]
Cost = Callable[["Histogram", Tensor, Tensor], Tensor]  # of ranges from their lower and upper ends
BINS = 2048
LEVELS = 255


class Histogram:
    """Counts of a stream of tensors, in bins that grow by powers of two as the range grows: bounded memory, one pass.

    `counts` has `BINS` entries of equal `width`; the first starts at `start`. Zero always lies on an edge between bins
    or inside the range.
    """

    def __init__(self) -> None:
        self.low, self.high = torch.inf, -torch.inf
        self.start, self.width = 0.0, 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count every entry of `values`; raises ValueError if one is not finite."""
        values = values.detach().reshape(-1)
        if not values.numel():  # what an expert gets that no token is sent to
            return
        low, high = (float(item) for item in torch.aminmax(values))
        if not (abs(low) < torch.inf and abs(high) < torch.inf):
            raise ValueError("not finite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.low == self.high:
            self.counts[0] += values.numel()
            self.start, self.width = self.low, 0.0
            return
        self._cover()
        end = self.start + self.width * BINS
        inside = values.float().clamp(self.start, end)  # the end may have been rounded below the highest value
        self.counts += torch.histc(inside, BINS, self.start, end).cpu().double()

    @property
    def empty(self) -> bool:
        """Whether nothing was counted."""
        return self.low > self.high

    def _cover(self) -> None:
        """Make the bins reach from `low` to `high`; what was counted moves to the bin that now holds its middle."""
        end = self.start + self.width * BINS
        if self.width and self.low >= self.start and self.high <= end:
            return
        if self.width:
            low, high = min(self.low, self.start), max(self.high, end)
            middles = self.middles()
        else:
            low, high = self.low, self.high
            middles = torch.full((BINS,), self.start, dtype=torch.float64)
        old, self.counts = self.counts, torch.zeros(BINS, dtype=torch.float64)
        slack = 0.25 * (high - low) if self.width else 0.0
        low, high = (
            (low - slack if low < self.start or not self.width else low),
            (high + slack if high > end or not self.width else high),
        )
        self.start, self.width = low, (high - low) / BINS
        index = ((middles - self.start) / self.width).long().clamp_(0, BINS - 1)
        self.counts.index_add_(0, index, old)

    def middles(self) -> Tensor:
        """The middle of each bin."""
        return self.start + self.width * (torch.arange(BINS, dtype=torch.float64) + 0.5)


def activation_range(
    histogram: Histogram, method: Calibration, percentile: float = 99.99, bits: int = 8, symmetric: bool = False
) -> tuple[float, float]:
    """The range of an activation, zero included, that a grid of `bits` is spread over; equal on both sides of zero if
    `symmetric`, unless nothing lies below zero.
    """
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    symmetric = symmetric and low < 0
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if method == "minmax" or histogram.width == 0.0:
        return low, high
    if method == "percentile":
        low, high = percentile_range(histogram, percentile)
        return (-max(-low, high), max(-low, high)) if symmetric else (low, high)
    cost = partial(squared_error if method == "mse" else divergences, levels=2**bits - 1)
    return best_range(histogram, low, high, cost, symmetric)


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """The range that leaves out (100 - percentile)% of all values, half of it at either end where values lie there."""
    share = torch.cumsum(histogram.counts, 0) / histogram.counts.sum()
    outside = (1 - percentile / 100) / 2
    edges = histogram.start + histogram.width * torch.arange(1, BINS + 1, dtype=torch.float64)
    low = float(edges[int((share <= outside).sum())] - histogram.width)
    high = float(edges[min(BINS - 1, int((share < 1 - outside).sum()))])
    return min(max(low, histogram.low), 0.0), max(min(high, histogram.high), 0.0)


def best_range(
    histogram: Histogram, low: float, high: float, cost: Cost, symmetric: bool = False
) -> tuple[float, float]:
    """The range, shrunk from `low`..`high` by up to 80% at either end in turn, that has the least `cost`; at both ends
    together if `symmetric`.
    """
    parts = torch.linspace(1.0, 0.2, 65, dtype=torch.float64)
    ones = torch.ones_like(parts)
    for side in (0, 1, 0, 1) if not symmetric else (2,):
        lows, highs = low * (ones if side == 1 else parts), high * (ones if side == 0 else parts)
        best = int(cost(histogram, lows, highs).argmin())  # the first, that is the widest, of equals
        low, high = float(lows[best]), float(highs[best])
    return low, high


def squared_error(histogram: Histogram, low: float | Tensor, high: float | Tensor, levels: int = LEVELS) -> Tensor:
    """Mean squared error of rounding to `levels` steps between `low` and `high`: clipping plus rounding inside, from
    the counts. One error per entry of `low` and `high`.
    """
    values = histogram.middles()
    lows, highs = (torch.as_tensor(end, dtype=torch.float64)[..., None] for end in (low, high))
    step = (highs - lows) / levels
    zero = torch.round(-lows / step)
    rounded = (torch.clamp(torch.round(values / step) + zero, 0, levels) - zero) * step
    inside = (values >= lows) & (values <= highs)
    error = torch.where(inside, step**2 / 12, (values - rounded) ** 2)
    return (histogram.counts * error).sum(-1) / histogram.counts.sum()


def divergences(histogram: Histogram, low: Tensor, high: Tensor, levels: int = LEVELS) -> Tensor:
    """The `divergence` of each range."""
    ranges = zip(low.tolist(), high.tolist())
    return torch.tensor([divergence(histogram, *each, levels) for each in ranges], dtype=torch.float64)


def divergence(histogram: Histogram, low: float, high: float, levels: int = LEVELS) -> float:
    """Kullback-Leibler divergence of the clipped distribution from its quantized form.

    What lies outside is counted at the ends; each of the `levels` + 1 steps spreads its count evenly over its non-empty
    bins. Migacz, "8-bit inference with TensorRT", GTC 2017.
    """
    values, counts = histogram.middles(), histogram.counts
    inside = (values >= low) & (values <= high)
    if high <= low or not inside.any():
        return torch.inf
    clipped = torch.where(inside, counts, torch.zeros_like(counts))
    first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
    clipped[first] += counts[:first].sum()
    clipped[last] += counts[last + 1 :].sum()
    step = ((values - low) / ((high - low) / levels)).round().long().clamp(0, levels)
    filled = (clipped > 0).double()
    totals = torch.zeros(levels + 1, dtype=torch.float64).index_add_(
        0, step, torch.where(inside, counts, torch.zeros_like(counts))
    )
    bins = torch.zeros(levels + 1, dtype=torch.float64).index_add_(0, step, filled)
    quantized = (totals / bins.clamp_min(1))[step] * filled
    p, q = clipped / clipped.sum(), quantized / quantized.sum().clamp_min(1e-30)
    some = p > 0
    return float((p[some] * (p[some] / q[some].clamp_min(1e-12)).log()).sum())
