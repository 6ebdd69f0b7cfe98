"""Labels on the indices of tensor dimensions: indices with one label can only be removed together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Dim:
    """One dimension of a tensor: one label per index, or None for all of them and the reason why it is fixed."""

    size: int
    labels: Indices | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        assert self.labels is None or len(self.labels) == self.size, (
            f"{len(self.labels)} labels for {self.size} indices"
        )

    @property
    def free(self) -> bool:
        return self.labels is not None


class Shape(tuple[Dim, ...]):
    """The dimensions of one tensor."""

    __slots__ = ()


def fixed(size: int, reason: str) -> Dim:
    """A dimension that nothing can be removed from."""
    return Dim(size, None, reason)


def free(labels: Indices) -> Dim:
    """A dimension with these labels."""
    return Dim(len(labels), labels)


class Labels:
    """All labels of one graph: which belong together, and which may not be removed and why."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[tuple[Indices, Indices]] = []
        self._frozen: list[tuple[Indices, str]] = []

    def fresh(self, size: int) -> Dim:
        """A dimension whose indices have new labels; one of size one is fixed, since nothing would be left of it."""
        if size < 2:
            return fixed(size, "it has a single index")
        return free(self.some(size))

    def some(self, size: int) -> Indices:
        """New labels."""
        self.count += size
        return np.arange(self.count - size, self.count)

    def explicit(self, dim: Dim) -> Indices:
        """The labels of `dim`; those of a fixed dimension are made, frozen."""
        if dim.labels is not None:
            return dim.labels
        labels = self.some(dim.size)
        self._frozen.append((labels, dim.reason))
        return labels

    def couple(self, one: Indices, other: Indices) -> None:
        """Indices of `one` and `other` (broadcast against each other) can only be removed together."""
        a, b = np.broadcast_arrays(one, other)
        if a is not b:
            self._pairs.append((a.reshape(-1), b.reshape(-1)))

    def freeze(self, dim: Dim, reason: str) -> Dim:
        """Nothing may be removed from `dim`; returns it as a fixed dimension."""
        if dim.labels is None:
            return dim
        self._frozen.append((dim.labels, reason))
        return fixed(dim.size, reason)

    def unite(self, one: Dim, other: Dim) -> Dim:
        """Two dimensions of one size become one: fixed if either is, else index by index coupled."""
        if one.labels is None:
            return self.freeze(other, one.reason)
        if other.labels is None:
            return self.freeze(one, other.reason)
        self.couple(one.labels, other.labels)
        return one

    def components(self) -> tuple[Indices, dict[int, str]]:
        """The component of every label, and for each component that may not be removed the first reason given."""
        if not self.count:
            return np.zeros(0, dtype=np.int64), {}
        a, b = (
            np.concatenate([pair[side] for pair in self._pairs] or [np.zeros(0, dtype=np.int64)]) for side in (0, 1)
        )
        graph = coo_matrix((np.ones(len(a), dtype=np.int8), (a, b)), shape=(self.count, self.count))
        _, component = connected_components(graph, directed=False)
        reasons: dict[int, str] = {}
        for labels, reason in self._frozen:
            for place in np.unique(component[labels]):
                reasons.setdefault(int(place), reason)
        return component.astype(np.int64), reasons
