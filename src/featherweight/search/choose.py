"""Which candidate is best: the bar, the order among those that meet it, the nearest if none does, the Pareto front.
Pure functions.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..core.run import Budget

LATENCY_NOISE = 0.03  # two loads of one file on a quiet machine differ by this much
MOST_CONTENDERS = 3
MOST_NOISE = 0.1  # on a busy machine, ties are still no wider than this


class Figures(BaseModel):
    """What was measured of one candidate on the validation split.

    `drop` is in the metric's unit, positive if it is worse than the original; `drop_high` is the upper end of its 95%
    paired bootstrap interval. `latency_ms` is the p50 at batch 1 on one thread: the ratio to the original in one
    interleaved run, times the original's figure, so that candidates measured at different moments compare.
    `latency_noise` is the relative half width of its 95% interval.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    accuracy: float
    drop: float
    drop_high: float
    bytes: int
    latency_ms: float
    latency_noise: float = LATENCY_NOISE
    energy_mj: float | None = None


def excess(figures: Figures, budget: Budget, drop: float | None = None) -> dict[str, float]:
    """How far each limit of the bar is exceeded: positive is too much, zero or less is met.

    The drop is in the metric's unit; size and latency are shares of their limit. `drop` stands in for the point
    estimate.
    """
    found = {}
    if budget.max_drop is not None:
        found["drop"] = (figures.drop if drop is None else drop) - budget.max_drop
    if budget.max_size is not None:
        found["size"] = figures.bytes / budget.max_size - 1
    if budget.max_latency is not None:
        found["latency"] = figures.latency_ms / budget.max_latency - 1
    return found


def meets(figures: Figures, budget: Budget) -> bool:
    """Whether every limit is met by the point estimates."""
    return all(value <= 1e-9 for value in excess(figures, budget).values())


def surely_meets(figures: Figures, budget: Budget) -> bool:
    """Whether every limit is met, and the drop by the upper end of its interval."""
    return all(value <= 1e-9 for value in excess(figures, budget, figures.drop_high).values())


def value(figures: Figures, budget: Budget) -> float:
    """What the search makes small: milliseconds, bytes, millijoules, or the drop."""
    if budget.objective == "energy":
        if figures.energy_mj is None:
            raise ValueError("the objective is energy, but the candidate has no energy figure")
        return figures.energy_mj
    return {"latency": figures.latency_ms, "size": float(figures.bytes), "accuracy": figures.drop}[budget.objective]


def choose(tried: Mapping[int, Figures], budget: Budget) -> int:
    """The number of the best candidate.

    From those whose drop meets the bar with the upper end of its paired interval; if there are none, or the split is
    too small to tell (`too_small`), from those whose point estimate does; if there are none either, the nearest: the
    one that exceeds its limits by the least in sum, each as a share of its limit. Within a group the smallest `value`
    wins. Latency is noisy, so candidates whose latency is within measurement noise of the smallest (the half widths
    of the two intervals together, but from 3% to 10%) count as tied; ties go to the smaller file, then to the smaller
    drop, then to the recipe that was tried first. Size, energy and accuracy are compared as they are.
    """
    group = eligible(tried, budget)
    if not group:
        return min(tried, key=lambda number: (distance(tried[number], budget), value(tried[number], budget), number))
    best = min(group, key=lambda number: (value(group[number], budget), number))
    tied = [number for number in group if _tied(group[best], group[number], budget)]
    return min(tied, key=lambda number: (group[number].bytes, group[number].drop, number))


def eligible(tried: Mapping[int, Figures], budget: Budget) -> dict[int, Figures]:
    """The candidates that `choose` chooses from if any meets the bar; empty if none does."""
    group = {number: figures for number, figures in tried.items() if meets(figures, budget)}
    if too_small(group, budget):
        return group
    return {number: figures for number, figures in group.items() if surely_meets(figures, budget)} or group


def contenders(tried: Mapping[int, Figures], budget: Budget) -> list[int]:
    """The candidates whose latency is so near the fastest eligible one's that only a run side by side can tell; the
    fastest first.
    """
    group = eligible(tried, budget)
    order = sorted(group, key=lambda number: (group[number].latency_ms, number))
    near = [number for number in order if group[number].latency_ms <= group[order[0]].latency_ms * (1 + MOST_NOISE)]
    return near[:MOST_CONTENDERS]


def too_small(group: Mapping[int, Figures], budget: Budget) -> bool:
    """Whether the split holds too few inputs for the bar: at least half of the candidates that answer differently
    from the original at all have an interval wider to one side than the drop that may be lost. To insist on the
    interval would then only choose what changes nothing.
    """
    widths = [figures.drop_high - figures.drop for figures in group.values() if figures.drop_high > figures.drop]
    return budget.max_drop is not None and bool(widths) and statistics.median(widths) > budget.max_drop


def _tied(best: Figures, other: Figures, budget: Budget) -> bool:
    if budget.objective != "latency":
        return value(other, budget) <= value(best, budget)
    noise = min(max(LATENCY_NOISE, best.latency_noise + other.latency_noise), MOST_NOISE)
    return other.latency_ms <= best.latency_ms * (1 + noise)


def distance(figures: Figures, budget: Budget) -> float:
    """How far a candidate is from the bar: the sum of what exceeds each limit, as a share of that limit."""
    over = excess(figures, budget)
    if "drop" in over:
        over["drop"] /= max(budget.max_drop or 0.0, 0.01)
    return sum(max(0.0, amount) for amount in over.values())


def front(tried: Mapping[int, Figures]) -> set[int]:
    """The candidates that no other one equals or betters in accuracy, latency and bytes alike (the Pareto front)."""
    points = {number: (figures.drop, figures.latency_ms, figures.bytes) for number, figures in tried.items()}
    return {
        number for number, point in points.items() if not any(_dominates(other, point) for other in points.values())
    }


def _dominates(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other))
