"""How many bits each layer gets: the least loss for a number of bits in all. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from .incoherent import Rotated

# Mean squared error of the trellis code on a unit Gaussian, window of 12 bits (benchmarks/gaussian.py).
DISTORTION = {1: 0.269, 2: 0.0705, 3: 0.0186, 4: 0.0049, 5: 0.00147, 6: 0.00052}


def cost(given: Rotated) -> float:
    """The loss that one unit of distortion in a weight is worth, once feedback has made up for what it can.

    It is the sum of the pivots of the Hessian times the squared errors (arXiv:2307.13304), which are alike for all
    columns and rows after rotation.
    """
    return float(given.matrix.square().sum() * given.costs.mean()) * given.worth


def allocate(costs: Mapping[str, float], counts: Mapping[str, int], bits: float) -> dict[str, int]:
    """Bits of each layer, from 1 to 6, of least summed loss `costs * DISTORTION` with `bits` per weight on average.

    `counts` are the numbers of weights. Every next bit goes where it saves most for each weight that it is spent on;
    as savings fall with every bit, no other choice of as many bits loses less.
    """
    found = dict.fromkeys(costs, min(DISTORTION))
    left = (bits - min(DISTORTION)) * sum(counts.values())
    saved = {(name, given): costs[name] * (DISTORTION[given - 1] - loss) / counts[name]
             for name in costs for given, loss in DISTORTION.items() if given - 1 in DISTORTION}  # fmt: skip
    for name, given in sorted(saved, key=lambda step: (-saved[step], step)):
        if found[name] == given - 1 and counts[name] <= left + 1e-6 and math.isfinite(saved[name, given]):
            found[name], left = given, left - counts[name]
    return found
