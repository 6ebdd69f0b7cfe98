"""Optimal Brain Surgeon on the rows of a matrix, exactly: which weight goes next, and what the others then become.

The loss of a pruned matrix is `tr(E H E^T)` with E = weight - pruned [rows, columns] and H the second moment of the
layer's inputs [columns, columns]; rows do not meet. Pure functions (Frantar, Singh and Alistarh, Optimal Brain
Compression, arXiv:2208.11580; Hassibi and Stork, Optimal Brain Surgeon, 1992).
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 2**24  # entries of the inverses that are held at a time


def removals(
    weight: Tensor, hessian: Tensor, count: int, allowed: Tensor, group: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """The first `count` weights of each row to go, in order, and what the loss rises by with each: [rows, count] both.

    In each step the weight of least `w^2 / [H^-1]_pp` goes, the others make up for it, and its row and column leave the
    inverse (algorithm 1). What is not `allowed` goes first. With `group` (n, m) no group of m neighbours loses more
    than m - n. `hessian` must be positive definite; the work is rows x count x columns^2.
    """
    rows = max(1, CHUNK // weight.shape[1] ** 2)
    inverse = torch.linalg.inv(hessian.double())
    parts = [
        _removals(weight[start : start + rows].double(), inverse, count, allowed[start : start + rows], group)
        for start in range(0, len(weight), rows)
    ]
    return torch.cat([order for order, _ in parts]), torch.cat([rise for _, rise in parts])


def _removals(
    weight: Tensor, inverse: Tensor, count: int, allowed: Tensor, group: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """`removals` of some rows, each with an inverse of its own."""
    weight, inverses = weight.clone(), inverse.expand(len(weight), -1, -1).clone()
    every = torch.arange(len(weight), device=weight.device)
    gone = torch.zeros_like(weight, dtype=torch.bool)
    order, rise = [], []
    for _ in range(count):
        price = weight.square() / inverses.diagonal(dim1=1, dim2=2).clamp_min(1e-300)
        price = price.masked_fill(~allowed, -1.0).masked_fill(gone | _full(gone, group), torch.inf)
        place = price.argmin(1)
        row = inverses[every, place] / inverses[every, place, place].clamp_min(1e-300)[:, None]
        order.append(place)
        rise.append(weight[every, place] * weight[every, place] / inverses[every, place, place].clamp_min(1e-300))
        weight.sub_(weight[every, place, None] * row)
        inverses.sub_(inverses[every, place][:, :, None] * row[:, None, :])
        gone[every, place] = True
        weight[gone] = 0.0
    if not order:
        empty = weight.new_zeros(len(weight), 0)
        return empty.long(), empty
    return torch.stack(order, 1), torch.stack(rise, 1)


def _full(gone: Tensor, group: tuple[int, int]) -> Tensor:
    """Where a group of m has lost m - n already."""
    kept, of = group
    if not of:
        return torch.zeros_like(gone)
    lost = gone.reshape(len(gone), -1, of).sum(2) >= of - kept
    return lost.repeat_interleave(of, 1)


def cheapest(order: Tensor, rise: Tensor, columns: int, count: int) -> Tensor:
    """The mask [rows, columns] that is left when `count` weights go in all, each row in its own `order`.

    The next to go is always the cheapest of the next in each row (section 4, global mask selection): the same as
    sorting by the largest rise up to each weight.
    """
    height = rise.cummax(1).values if rise.shape[1] else rise
    # a stable sort, step by step, keeps the order within each row
    ranked = torch.sort(height.t().flatten(), stable=True).indices[:count]
    taken = torch.zeros(height.numel(), dtype=torch.bool, device=order.device).scatter_(0, ranked, True)
    keep = torch.ones(len(order), columns, dtype=torch.bool, device=order.device)
    return keep.scatter_(1, order, ~taken.reshape(height.shape[1], len(order)).t())


def refitted(weight: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The weight of least loss whose entries outside `keep` are 0: one linear system for each row, solved exactly.

    What step after step of Optimal Brain Surgeon arrives at for this mask. `hessian` must be positive definite.
    """
    rows = max(1, CHUNK // weight.shape[1] ** 2)
    hessian = hessian.double()
    parts = []
    for start in range(0, len(weight), rows):
        stays = keep[start : start + rows].double()
        system = hessian * stays[:, :, None] * stays[:, None, :] + torch.diag_embed(1 - stays)
        right = stays * (weight[start : start + rows].double() @ hessian)
        parts.append(torch.linalg.solve(system, right) * stays)
    return torch.cat(parts).to(weight.dtype)
