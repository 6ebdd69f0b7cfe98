"""Which layers of a row share one set of weights: pure functions. A layout names the set of each layer, from 0."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor


def sequence(count: int, sets: int) -> list[int]:
    """Neighbours share: 0 0 1 1 for four layers and two sets (SEQUENCE of Takase and Kiyono, arXiv:2104.06022)."""
    return [place * sets // count for place in range(count)]


def cycle(count: int, sets: int) -> list[int]:
    """The sets come one after the other, again and again: 0 1 0 1 (CYCLE of Takase and Kiyono, arXiv:2104.06022)."""
    return [place % sets for place in range(count)]


def similar(vectors: Sequence[Tensor], sets: int) -> list[int]:
    """Layers share whose weights lie together: two sets at a time are joined, those whose means then miss the weights
    by the least square more (Ward, JASA 58, 1963), until `sets` are left. Sets are numbered as they first come.
    """
    count = len(vectors)
    if sets >= count:
        return list(range(count))
    if sets == 1:
        return [0] * count
    pairs = [(one, other) for one in range(count) for other in range(one + 1, count)]
    distances = np.array([float((vectors[one] - vectors[other]).double().norm()) for one, other in pairs])
    found = fcluster(linkage(distances, "ward"), sets, criterion="maxclust").tolist()
    order = list(dict.fromkeys(found))
    return [order.index(each) for each in found]
