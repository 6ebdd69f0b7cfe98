"""Vectors as sums of entries of several tables: each table is found on what the others leave. Pure functions.

Points are [n, length], their importance [n], tables [books, entries, length], indices [books, n]. Residual vector
quantization (Juang and Gray, ICASSP 1982), then one table after the other again, each for what all others leave
(coordinate descent, as for additive quantization: Babenko and Lempitsky, CVPR 2014).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.core.additive import summed

from .clusters import k_means, nearest

Start = Callable[[Tensor, Tensor], Tensor]  # (points, importance) -> a table to begin with


def find_tables(points: Tensor, importance: Tensor, books: int, start: Start, iterations: int, sweeps: int) -> Tensor:
    """Tables of little weighted error: greedily one after the other, then each again `sweeps` times; those are given
    that are best once `assign` starts anew, which may be earlier ones.
    """
    tables, rest = [], points
    for _ in range(books):
        table, indices = k_means(rest, start(rest, importance), importance, iterations)
        tables.append(table)
        rest = rest - table[indices]
    found = torch.stack(tables)
    indices = assign(points, found, 0)
    if books == 1 or not sweeps:
        return found
    best, least = found.clone(), missed(points, found, assign(points, found, sweeps), importance)
    for _ in range(sweeps):
        for book in range(books):
            left = points - without(found, indices, book)
            found[book], indices[book] = k_means(left, found[book], importance, iterations=1)
        if (loss := missed(points, found, assign(points, found, sweeps), importance)) < least:
            best, least = found.clone(), loss
    return best


def assign(points: Tensor, tables: Tensor, sweeps: int) -> Tensor:
    """The index of each point in each table: nearest to what the tables before leave, then each again `sweeps` times
    for what all others leave.
    """
    rest, found = points, []
    for table in tables:
        found.append(nearest(rest, table))
        rest = rest - table[found[-1]]
    indices = torch.stack(found)
    for _ in range(sweeps if len(tables) > 1 else 0):
        for book, table in enumerate(tables):
            indices[book] = nearest(points - without(tables, indices, book), table)
    return indices


def missed(points: Tensor, tables: Tensor, indices: Tensor, importance: Tensor) -> float:
    """The weighted squared error of the sums."""
    return float(((points - summed(tables, indices)).square().sum(1) * importance).sum())


def without(tables: Tensor, indices: Tensor, book: int) -> Tensor:
    """The sum of what all books but one give, [n, length]."""
    return summed(tables, indices) - tables[book][indices[book]]
