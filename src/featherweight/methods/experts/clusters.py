"""Neurons and experts put into groups that are alike. Pure functions."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from torch import Tensor


def balanced_clusters(features: Tensor, count: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """The cluster of each row of `features` [rows, columns]: k-means with clusters of equal size (`count` divides).

    Each round gives every row, those with most to lose first, the nearest centre that has room; the last one solves
    the assignment exactly. MoEfication groups neurons so (Zhang et al., arXiv:2110.01786, section 3.2).
    """
    rows, size = len(features), len(features) // count
    points = features.double()
    centres = points[_spread(points, count, generator)]
    for turn in range(rounds):
        distance = torch.cdist(points, centres).square()
        last = turn == rounds - 1
        owner = _exact(distance, size) if last and rows <= 4096 else _greedy(distance, size)
        centres = torch.stack([points[owner == place].mean(0) for place in range(count)])
    return owner


def _spread(points: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Rows far from each other: each next one with a chance in proportion to its squared distance (k-means++)."""
    found = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = (points - points[found[0]]).square().sum(1)
    while len(found) < count:
        chances = nearest + 1e-12 * nearest.max().clamp_min(1e-30)
        chances[found] = 0
        found.append(int(torch.multinomial(chances, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[found[-1]]).square().sum(1))
    return found


def _greedy(distance: Tensor, size: int) -> Tensor:
    order = distance.argsort(1)
    best = distance.sort(1).values
    regret = best[:, -1] - best[:, 0]
    room, owner = [size] * distance.shape[1], torch.empty(len(distance), dtype=torch.long)
    for row in regret.argsort(descending=True, stable=True).tolist():
        place = next(place for place in order[row].tolist() if room[place])
        owner[row], room[place] = place, room[place] - 1
    return owner


def _exact(distance: Tensor, size: int) -> Tensor:
    rows, columns = linear_sum_assignment(distance.repeat_interleave(size, 1).numpy())
    owner = torch.empty(len(distance), dtype=torch.long)
    owner[torch.from_numpy(rows)] = torch.from_numpy(columns) // size
    return owner


def groups(distance: Tensor, count: int) -> list[list[int]]:
    """`count` groups of rows by average linkage, from distances [rows, rows]; the first members ascend."""
    condensed = squareform(distance.double().numpy(), checks=False)
    labels = fcluster(linkage(condensed, "average"), count, "maxclust")
    found = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    while len(found) < count:  # where distances are equal, linkage may give fewer
        largest = max(found, key=len)
        found.append([largest.pop()])
    return sorted(found)


def matching(one: Tensor, other: Tensor) -> Tensor:
    """For each row of `one`, the row of `other` that stands for it: one each, at the least sum of squared distances."""
    cost = torch.cdist(one.double(), other.double()).square()
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])
