"""Which option each layer gets: the least loss within a budget, solved exactly. Pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEPS = 4096  # of the budget: costs are rounded up to these, so that a budget is never exceeded


@dataclass(frozen=True)
class Choices:
    """For every budget up to the largest one the least summed loss, and the options that give it.

    `losses` is [STEPS + 1]: infinite where even the cheapest options cost more. `taken` is [layers, STEPS + 1]. A step
    of the budget is worth `unit` of cost.
    """

    losses: NDArray[np.float64]
    taken: NDArray[np.int64]
    weights: list[NDArray[np.int64]]
    unit: float

    def options(self, budget: float) -> list[int]:
        """The option of each layer within `budget`. Raises `ValueError` if none fits."""
        place = min(int(budget / self.unit * (1 + 1e-9)), STEPS)
        if place < 0 or not np.isfinite(self.losses[place]):
            raise ValueError(f"even the cheapest options cost more than {budget:g}")
        found = []
        for taken, weights in zip(self.taken[::-1], self.weights[::-1]):
            found.append(int(taken[place]))
            place -= int(weights[found[-1]])
        return found[::-1]


def choose(costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], largest: float) -> Choices:
    """The multiple-choice knapsack over layers for all budgets up to `largest`, by dynamic programming.

    `costs` and `losses` hold one entry per layer and option; an option of infinite cost cannot be had. Losses of layers
    add up, as noise from different layers does where it is small and independent. Exact where costs are whole multiples
    of 1/4096 of `largest` or more; others are rounded up to such steps, so that a little of the budget may be left
    (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, section 11.5).
    """
    unit = _unit([float(each) for layer in costs for each in layer if np.isfinite(each)], largest)
    steps = (np.ceil(np.asarray(each, dtype=np.float64) / unit - 1e-9) for each in costs)
    weights = [np.minimum(each, STEPS + 1).astype(np.int64) for each in steps]  # more than there is: cannot be had
    best = np.zeros(STEPS + 1)
    taken = np.zeros((len(weights), STEPS + 1), dtype=np.int64)
    for layer, (sizes, prices) in enumerate(zip(weights, losses)):
        tried = np.full((len(sizes), STEPS + 1), np.inf)
        for option, (size, price) in enumerate(zip(sizes, prices)):
            if size <= STEPS:
                tried[option, size:] = best[: STEPS + 1 - size] + price
        taken[layer], best = tried.argmin(0), tried.min(0)
    return Choices(best, taken, weights, unit)


def _unit(costs: Sequence[float], largest: float) -> float:
    """A step of the budget: the greatest common divisor of whole costs, if it is no smaller than `largest` / STEPS."""
    least = largest / STEPS
    divisor = math.gcd(*map(int, costs)) if all(each.is_integer() for each in costs) else 0
    return float(divisor) if divisor >= least else least
