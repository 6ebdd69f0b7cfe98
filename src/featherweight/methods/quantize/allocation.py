"""How many bits each layer gets: the least loss for a number of bits in all. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from featherweight.core.knapsack import choose

from .incoherent import Rotated

# Mean squared error of the trellis code on a unit Gaussian, window of 12 bits (benchmarks/gaussian.py).
DISTORTION = {1: 0.26916, 2: 0.07053, 3: 0.01859, 4: 0.00488, 5: 0.00134, 6: 0.00040}


def cost(given: Rotated) -> float:
    """The loss that one unit of distortion in a weight is worth, once feedback has made up for what it can.

    It is the sum of the pivots of the Hessian times the squared errors (arXiv:2307.13304), which are alike for all
    columns and rows after rotation.
    """
    return float(given.matrix.square().sum() * given.costs.mean()) * given.worth


def allocate(costs: Mapping[str, float], counts: Mapping[str, int], bits: float) -> dict[str, int]:
    """Bits of each layer, from 1 to 6, of least summed loss `costs * DISTORTION` with `bits` per weight on average.

    `counts` are the numbers of weights. No other choice within the budget loses less, up to what `choose` rounds; what
    rounding leaves of the budget goes where a further bit saves most for each weight that it is spent on.
    """
    left = (bits - min(DISTORTION)) * sum(counts.values())
    known = {name: value if math.isfinite(value) else 0.0 for name, value in costs.items()}
    prices = [[counts[name] * (given - min(DISTORTION)) for given in DISTORTION] for name in costs]
    losses = [[value * loss for loss in DISTORTION.values()] for value in known.values()]
    chosen = choose(prices, losses, max(left, 1e-9)).options(left + 1e-6)
    found = {name: list(DISTORTION)[option] for name, option in zip(costs, chosen)}
    left -= sum(counts[name] * (given - min(DISTORTION)) for name, given in found.items())
    saved = {(name, given): known[name] * (DISTORTION[given - 1] - loss) / counts[name]
             for name in costs for given, loss in DISTORTION.items() if given - 1 in DISTORTION}  # fmt: skip
    for name, given in sorted(saved, key=lambda step: (-saved[step], step)):
        if found[name] == given - 1 and counts[name] <= left + 1e-6:
            found[name], left = given, left - counts[name]
    return found
