"""Clusters of weights, and of short vectors of weights: k-means with weights of importance. Pure functions.

Points are [n, length], their importance [n] (or None: all alike), a table is [entries, length].
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**22  # distances that are held at a time


def linear_start(points: Tensor, entries: int) -> Tensor:
    """Entries evenly spaced between the smallest and the largest value (Han et al., arXiv:1510.00149, section 3.2)."""
    low, high = points.amin(0), points.amax(0)
    share = torch.linspace(0, 1, entries, dtype=points.dtype, device=points.device)[:, None]
    return low + share * (high - low)


def density_start(points: Tensor, entries: int, importance: Tensor | None = None) -> Tensor:
    """Entries in the middle of parts of equal importance of the sorted values: many where many weights lie.

    Vectors are ordered by their projection on the direction in which they vary most.
    """
    if points.shape[1] == 1:
        order = points[:, 0].argsort()
    else:
        centred = points - points.mean(0)
        order = (centred @ torch.linalg.eigh(centred.t() @ centred).eigenvectors[:, -1]).argsort()
    mass = _mass(points, importance)[order].cumsum(0)
    middles = (torch.arange(entries, dtype=mass.dtype, device=mass.device) + 0.5) / entries * mass[-1]
    return points[order][torch.searchsorted(mass, middles).clamp_max(len(points) - 1)]


def plus_plus_start(
    points: Tensor, entries: int, generator: torch.Generator, importance: Tensor | None = None
) -> Tensor:
    """Entries drawn one after the other from the points, each with a chance in proportion to its squared distance from
    those drawn before (k-means++: Arthur and Vassilvitskii, SODA 2007).
    """
    mass = _mass(points, importance)
    chosen = [int(torch.multinomial(_some(mass), 1, generator=generator))]
    distance = (points - points[chosen[0]]).square().sum(1)
    for _ in range(entries - 1):
        chosen.append(int(torch.multinomial(_some(mass * distance), 1, generator=generator)))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    return points[torch.tensor(chosen)]


def _some(mass: Tensor) -> Tensor:
    """Chances for a drawing; all alike where none is left (every point is an entry already). It takes 2**24 at most."""
    even = torch.ones_like(mass) if float(mass.sum()) <= 0 else mass
    if len(even) <= 2**24:
        return even
    stride = -(-len(even) // 2**24)
    thinned = torch.zeros_like(even)
    thinned[::stride] = even[::stride]
    return thinned


def _mass(points: Tensor, importance: Tensor | None) -> Tensor:
    return torch.ones(len(points), dtype=points.dtype) if importance is None else importance.to(points.dtype)


def nearest(points: Tensor, table: Tensor) -> Tensor:
    """The index of the entry nearest to each point, [n]."""
    if table.shape[1] == 1:
        values, order = table[:, 0].sort()
        return order[torch.bucketize(points[:, 0].contiguous(), (values[1:] + values[:-1]) / 2)]
    half = table.square().sum(1) / 2
    parts = points.split(max(1, CHUNK // len(table)))
    return torch.cat([(half - part @ table.t()).argmin(1) for part in parts])


def k_means(
    points: Tensor,
    table: Tensor,
    importance: Tensor | None = None,
    iterations: int = 50,
    held: int = 0,
) -> tuple[Tensor, Tensor]:
    """The table after Lloyd's iterations from `table`, and the index of each point; the first `held` entries stay.

    Ends early when no point changes its entry. An entry that no point is nearest to moves to the point of the largest
    weighted error. The squared error, weighted by `importance`, never rises (Lloyd, IEEE IT 28, 1982).
    """
    table, mass = table.clone(), _mass(points, importance)
    indices = nearest(points, table)
    for _ in range(iterations):
        _move(points, table, indices, mass, held)
        found = nearest(points, table)
        if torch.equal(found, indices):
            break
        indices = found
    return table, indices


def _move(points: Tensor, table: Tensor, indices: Tensor, mass: Tensor, held: int) -> None:
    """Move every entry to the mean of its points, and an entry without points to where the error is largest."""
    total = torch.zeros_like(table).index_add_(0, indices, points * mass[:, None])
    weight = torch.zeros(len(table), dtype=mass.dtype).index_add_(0, indices, mass)
    used = weight > 0
    used[:held] = False
    table[used] = total[used] / weight[used][:, None]
    empty = (weight <= 0).nonzero()[:, 0]
    empty = empty[empty >= held]
    if len(empty):
        error = (points - table[indices]).square().sum(1) * mass
        worst = error.topk(min(len(empty), len(points))).indices
        worst = worst[error[worst] > 0]
        table[empty[: len(worst)]] = points[worst]


def error(points: Tensor, table: Tensor, indices: Tensor, importance: Tensor | None = None) -> float:
    """The squared error over all points, weighted by `importance`."""
    return float(((points - table[indices]).square().sum(1) * _mass(points, importance)).sum())
