"""Figures with a 95% interval, from samples: pure functions of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from .timing import Samples

RESOLUTION = 0.01  # of a ratio of two times in one process


class Estimate(NamedTuple):
    """A figure and its 95% interval."""

    value: float
    low: float
    high: float


def mean_estimate(values: Sequence[float] | np.ndarray, confidence: float = 0.95) -> Estimate:
    """The mean of independent values with Student's t interval (1908); a single value has no width."""
    array = np.asarray(values, dtype=np.float64)
    value, half = float(array.mean()), 0.0
    if len(array) > 1:
        quantile = stats.t.ppf((1 + confidence) / 2, len(array) - 1)
        half = float(quantile * array.std(ddof=1) / np.sqrt(len(array)))
    return Estimate(value, value - half, value + half)


def share_estimate(parts: np.ndarray) -> Estimate:
    """The mean of values between 0 and 1 with Wilson's score interval (1927), which has a width at 0 and at 1 too.

    For values between the two it is on the wide side: none varies more than a yes or no of the same mean.
    """
    count, share = len(parts), float(parts.mean())
    z = float(stats.norm.ppf(0.975))
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return Estimate(share, min(share, float(centre - half)), max(share, float(centre + half)))


def pooled_estimates(
    loads: Sequence[Samples], figure: Callable[[np.ndarray], np.ndarray], resamples: int = 300, seed: int = 0
) -> list[Estimate]:
    """Figures of all runs taken together, with intervals that know how the runs hang together.

    `loads` holds the runs of each time that the artifact was loaded; `figure` maps seconds to an array of figures.
    The interval is a percentile bootstrap in two stages, loads and then rounds (Davison and Hinkley 1997, 3.8): runs
    of one load share its place in memory, runs of one round the moment, and neither counts as if it were independent.
    """
    generator = np.random.default_rng(seed)
    values = np.asarray(figure(_pool(loads)), dtype=np.float64)
    drawn = np.array([figure(_pool(_redrawn(loads, generator))) for _ in range(resamples)])
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return [
        Estimate(*(float(part) for part in parts))
        for parts in zip(values, np.minimum(low, values), np.maximum(high, values))
    ]


def _redrawn(loads: Sequence[Samples], generator: np.random.Generator) -> list[Samples]:
    chosen = [loads[place] for place in generator.integers(0, len(loads), len(loads))]
    return [load[generator.integers(0, len(load), len(load))] for load in chosen]


def _pool(loads: Sequence[Samples]) -> np.ndarray:
    return np.concatenate([load.ravel() for load in loads])


def speedup(
    original: Sequence[Samples], compressed: Sequence[Samples], resamples: int = 1000, seed: int = 0
) -> Estimate:
    """How many times faster `compressed` ran: the median over rounds of the ratio of the round's two medians.

    Both lists hold one array per load, and row i of both was taken in the same moment, so what slows the machine down
    cancels. The interval is the wider, on each side, of three: a percentile bootstrap over all rounds, which sees the
    noise of the moment; Student's t over the loads, which sees that one and the same file runs a few percent faster or
    slower each time that it is loaded (Mytkowicz et al., ASPLOS 2009); and 1%, below which the order of the calls and
    their Python can be told apart but the artifacts cannot. The first two are taken at 99%, so that five conditions
    side by side (batch sizes, threads) hold together at 95% (Bonferroni). An artifact compared with itself gives an
    interval that holds 1.
    """
    pairs = zip(original, compressed, strict=True)
    logs = [np.log(np.median(one, axis=1) / np.median(other, axis=1)) for one, other in pairs]
    every = np.concatenate(logs)
    value = float(np.median(every))
    index = np.random.default_rng(seed).integers(0, len(every), (resamples, len(every)))
    low, high = np.percentile(np.median(every[index], axis=1), [0.5, 99.5])
    by_load = mean_estimate([float(np.median(log)) for log in logs], confidence=0.99)
    bounds = min(value - RESOLUTION, low, by_load.low), max(value + RESOLUTION, high, by_load.high)
    return Estimate(*(float(np.exp(part)) for part in (value, *bounds)))
