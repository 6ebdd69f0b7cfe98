"""How many units each group keeps, so that a cost is met: pure functions on numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, gcd, lcm

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Price = Callable[[Counts], float]


@dataclass(frozen=True)
class Limits:
    """How many units a group has, the least it keeps, and the step in which it gives them up."""

    units: int
    least: int
    step: int

    def allowed(self, wanted: float) -> int:
        """The number of units to keep that is nearest to `wanted` and allowed: a multiple of `step`, or all."""
        if wanted >= self.units:
            return self.units
        nearest = int(wanted / self.step + 0.5) * self.step
        return min(self.units, max(nearest, ceil(self.least / self.step) * self.step))


def limits(units: int, whole: int, least: float, multiple: int, widths: Sequence[int]) -> Limits:
    """The limits of a group of `units` that had `whole` before anything was cut; a share `least` of these must stay,
    and at least one.

    `widths` are the indices per unit along each dimension that the group cuts: enough units go together to change
    every width by a multiple of `multiple`. A group that had fewer than two such steps is too small for that, and
    gives up single units.
    """
    step = lcm(*(multiple // gcd(multiple, width) for width in widths))
    return Limits(units, min(units, max(1, ceil(least * whole))), step if whole >= 2 * step else 1)


def by_rank(scores: Sequence[NDArray[np.float64]], bounds: Sequence[Limits], price: Price, target: float) -> Counts:
    """Remove the units with the lowest scores of all groups until the price is met; then give back what still fits.

    Of all removals in order of score the shortest that is cheap enough is found by bisection (the price falls with
    every removal).
    """
    owner = np.concatenate([np.full(len(part), place) for place, part in enumerate(scores)])
    order = owner[np.argsort(np.concatenate(list(scores)), kind="stable")]

    def kept(removed: int) -> Counts:
        gone = np.bincount(order[:removed], minlength=len(bounds))
        return np.array([bound.allowed(bound.units - count) for bound, count in zip(bounds, gone)])

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if price(kept(middle)) <= target else (middle + 1, high)
    ranked = [np.sort(part)[::-1] for part in scores]
    return give_back(kept(low), bounds, price, target, lambda place, count: float(ranked[place][count]))


def by_share(bounds: Sequence[Limits], price: Price, target: float) -> Counts:
    """Every group keeps the same share of its units, as many as the price allows; then give back what still fits."""

    def kept(share: float) -> Counts:
        return np.array([bound.allowed(share * bound.units) for bound in bounds])

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if price(kept(middle)) <= target else (low, middle)
    return give_back(kept(low), bounds, price, target, lambda place, count: -count / bounds[place].units)


def give_back(
    kept: Counts, bounds: Sequence[Limits], price: Price, target: float, worth: Callable[[int, int], float]
) -> Counts:
    """Give units back, one step of one group at a time, as long as the price stays within the target.

    `worth(group, count)` says what the next unit of a group that keeps `count` is worth; the highest comes first.
    """
    open_ = {place for place, bound in enumerate(bounds) if kept[place] < bound.units}
    while open_:
        place = max(open_, key=lambda place: (worth(place, int(kept[place])), -place))
        more = kept.copy()
        more[place] = min(bounds[place].units, kept[place] + bounds[place].step)
        if price(more) <= target:
            kept = more
            if kept[place] == bounds[place].units:
                open_.discard(place)
        else:
            open_.discard(place)
    return kept
