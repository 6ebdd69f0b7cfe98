"""How much of each layer goes: the least measured loss for a number of weights in all. Pure functions on numbers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...core.knapsack import choose

LEVELS = (1.5, 1.0, 0.7, 0.45)  # shares of weights to measure a layer at, over the share that is kept in all
FINENESS = 64  # choices for each layer between nothing pruned and the sparsest level


def levels(sparsity: float, present: float, least: float) -> list[float]:
    """The sparsities at which a layer is measured: above its `present` one, keeping at least a share of `least`."""
    kept = [min(1.0, factor * (1 - sparsity)) for factor in LEVELS]
    return sorted({1 - max(each, least, 1e-9) for each in kept if present < 1 - max(each, least) - 1e-9})


def allocate(
    losses: Mapping[str, Mapping[float, float]],
    counts: Mapping[str, int],
    sparsity: float,
    present: Mapping[str, float],
) -> dict[str, float]:
    """The sparsity of each layer of least summed loss, with `sparsity` over all weights.

    `losses` holds what each layer lost at the sparsities where it was measured, `present` what sparsity it has already,
    where it loses nothing. In between, losses are on straight lines, rising with sparsity. Solved exactly, as a
    multiple-choice knapsack over 64 sparsities a layer; what rounding leaves of the budget is shared out by size.
    """
    choices = {name: np.linspace(present[name], max([present[name], *each]), FINENESS) for name, each in losses.items()}
    prices = [list(counts[name] * (1 - each)) for name, each in choices.items()]
    lost = [list(interpolated(losses[name], present[name], each)) for name, each in choices.items()]
    budget = (1 - sparsity) * sum(counts.values())
    least = sum(min(each) for each in prices)
    budget = max(budget, least * (1 + 1e-9) + 1e-9)
    spare = [[price - min(each) for price in each] for each in prices]  # the least is spent whatever is chosen
    found = choose(spare, lost, max(budget - least, 1e-9)).options(max(budget - least, 0.0))
    kept = {name: counts[name] * (1 - float(choices[name][place])) for name, place in zip(choices, found)}
    return {name: 1 - each / counts[name] for name, each in _topped_up(kept, counts, present, budget).items()}


def interpolated(losses: Mapping[float, float], present: float, sparsities: np.ndarray) -> np.ndarray:
    """The loss at other sparsities than those measured; noise that lets it fall is taken out."""
    places = [present, *sorted(losses)]
    values = np.maximum.accumulate([0.0, *(max(0.0, losses[place]) for place in sorted(losses))])
    return np.interp(sparsities, places, values)


def _topped_up(
    kept: dict[str, float], counts: Mapping[str, int], present: Mapping[str, float], budget: float
) -> dict[str, float]:
    """Share what is left of the budget out over the layers by size, none above what it has."""
    for _ in range(8):
        left = budget - sum(kept.values())
        open_ = [name for name in kept if kept[name] < counts[name] * (1 - present[name]) - 1e-9]
        total = sum(counts[name] for name in open_)
        if left <= 1e-9 or not total:
            break
        for name in open_:
            kept[name] = min(counts[name] * (1 - present[name]), kept[name] + left * counts[name] / total)
    return kept
