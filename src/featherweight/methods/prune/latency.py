"""Time on the target as a function of widths: a table measured on artifacts, and pure functions that read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ...core.context import Context
from ...model.cost import Cost, macs
from ...model.cut import remove, shell
from ...model.groups import Coupling
from .plan import Limits

WIDTHS = 3  # measured of each group, beside the one that it has
Floats = NDArray[np.float64]


def widths_to_measure(bound: Limits, most: int = WIDTHS) -> list[int]:
    """Up to `most` allowed numbers of units, spread from the least to the last below all."""
    allowed = sorted({bound.allowed(count) for count in range(1, bound.units)} - {bound.units})
    places = np.linspace(0, len(allowed) - 1, min(most, len(allowed))).round().astype(int)
    return [allowed[place] for place in dict.fromkeys(places.tolist())]


def effective(cost: Callable[[float], float], share: float, units: int) -> float:
    """The width between 0 and `units` at which `cost`, which grows with the width, is `share` of what it is at `units`.

    Its ends where no width between them is.
    """
    target, low, high = share * cost(units), 0.0, float(units)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return high


class Latency:
    """Time of one run of a network that keeps so many units of each group; with all of them it takes `whole`.

    A group that was measured at some widths costs there as much as its `effective` width would if time followed the
    multiply-accumulates; between them it is interpolated. Effective widths of several groups multiply where the
    groups are the two sides of one layer, as multiply-accumulates do; savings of single groups, added up, would not.
    """

    def __init__(self, cost: Cost, units: Sequence[int], whole: float, tables: Mapping[int, tuple[Floats, Floats]]):
        self.cost, self.tables = cost, tables
        self.rate = whole / cost(units)

    def __call__(self, kept: NDArray[Any]) -> float:
        counts = np.array(kept, dtype=np.float64)
        for place, (widths, wide) in self.tables.items():
            counts[place] = np.interp(counts[place], widths, wide)
        return self.rate * self.cost(counts)


def table(cost: Cost, units: Sequence[int], place: int, shares: Mapping[int, float]) -> tuple[Floats, Floats]:
    """Widths of one group, and the effective width of each, from the share of the whole network's time at each width.

    Time that falls where a group gets wider is taken as noise: a width takes no longer than a larger one.
    """

    def alone(width: float) -> float:
        counts = np.array(units, dtype=np.float64)
        counts[place] = width
        return cost(counts)

    widths = np.array([*sorted(shares), units[place]], dtype=np.float64)
    times = np.array([*(shares[width] for width in sorted(shares)), 1.0])
    times = np.minimum(np.minimum.accumulate(times[::-1])[::-1], 1.0)
    wide = [effective(alone, share, units[place]) for share in times[:-1]]
    return np.concatenate([[0.0], widths]), np.array([0.0, *wide, units[place]])


def measure(
    model: nn.Module, start: nn.Module, ctx: Context, coupling: Coupling, bounds: Mapping[int, Limits]
) -> Latency:
    """Measure `model` on the target with each group in `bounds` narrowed alone; groups that look alike only once.

    All are timed beside `start`, whose time is one.
    Units are taken from the end of each group: what they hold does not matter for time.
    """
    cost = macs(coupling)
    units = [len(group) for group in coupling.groups]
    alike = {place: _looks(coupling, cost, units, place) for place in bounds}
    firsts = {look: place for place, look in reversed(alike.items())}
    wanted = [(place, width) for place in firsts.values() for width in widths_to_measure(bounds[place])]
    narrow = [_narrow(model, coupling, place, width) for place, width in wanted]
    unit, whole, *times = ctx.seconds([start, model, *narrow])
    shares: dict[int, dict[int, float]] = {place: {} for place in firsts.values()}
    for (place, width), time in zip(wanted, times):
        shares[place][width] = time / whole
    measured = {place: look for place, look in alike.items() if shares[firsts[look]]}
    tables = {place: table(cost, units, place, shares[firsts[look]]) for place, look in measured.items()}
    return Latency(cost, units, whole / unit, tables)


def _looks(coupling: Coupling, cost: Cost, units: Sequence[int], place: int) -> str:
    """What decides the time that narrowing a group saves: its tensors' shapes, and its multiply-accumulates."""
    group, fewer = coupling.groups[place], list(units)
    fewer[place] -= 1
    shapes = sorted((coupling.shapes[name], dim) for name, dim in group.places)
    return repr((len(group), shapes, round(cost(units) - cost(fewer))))


def _narrow(model: nn.Module, coupling: Coupling, place: int, width: int) -> nn.Module:
    gone = np.arange(width, len(coupling.groups[place]))
    return remove(shell(model), coupling, {place: gone})
