"""Bases of the dimensions of traced tensors: which are one and the same, and which are fixed, and why."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A dimension of a traced tensor that follows a basis; `squared` if it holds the squares of its entries."""

    basis: int
    squared: bool = False


Axes = tuple[Axis | str, ...]  # a string says why the basis of that dimension is fixed


@dataclass(frozen=True, eq=False)
class Value:
    """A traced tensor: its sizes, and what each of its dimensions follows."""

    sizes: tuple[int, ...]
    axes: Axes


class Bases:
    """All bases of one graph: which are one, which are fixed and why.

    A basis acts on blocks: a dimension of n entries is n / block vectors of `block` entries, all rotated alike.
    """

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._block: list[int] = []
        self._reason: list[str] = []
        self._ones: list[bool] = []

    def fresh(self, size: int) -> Axis | str:
        """A dimension with a basis of its own."""
        if size < 2:
            return "it has a single entry"
        self._parent.append(len(self._parent))
        self._block.append(size)
        self._reason.append("")
        self._ones.append(False)
        return Axis(len(self._parent) - 1)

    def find(self, basis: int) -> int:
        while self._parent[basis] != basis:
            self._parent[basis] = basis = self._parent[self._parent[basis]]
        return basis

    def unite(self, *axes: Axis | str) -> Axis | str:
        """All become one; where one is fixed, or holds squares, all are."""
        reason = next((axis for axis in axes if isinstance(axis, str)), "")
        if not reason and any(axis.squared for axis in axes if isinstance(axis, Axis)):
            reason = "its squares are added to something"
        if reason:
            return self.fix(reason, *axes)
        roots = [self.find(axis.basis) for axis in axes if isinstance(axis, Axis)]
        for other in roots[1:]:
            self._join(roots[0], self.find(other))
        return axes[0]

    def _join(self, one: int, other: int) -> None:
        one = self.find(one)
        if one != other:
            self._parent[other] = one
            self._block[one] = math.gcd(self._block[one], self._block[other])
            self._reason[one] = self._reason[one] or self._reason[other]
            self._ones[one] = self._ones[one] or self._ones[other]

    def fix(self, reason: str, *axes: Axis | str) -> str:
        """These keep the basis that they have."""
        for axis in axes:
            if isinstance(axis, Axis):
                root = self.find(axis.basis)
                self._reason[root] = self._reason[root] or reason
        return reason

    def cut(self, axis: Axis | str, *sizes: int) -> Axis | str:
        """The blocks must divide these sizes."""
        if isinstance(axis, Axis):
            root = self.find(axis.basis)
            self._block[root] = math.gcd(self._block[root], *sizes)
        return axis

    def keep_ones(self, axis: Axis | str) -> Axis | str:
        """The rotation must leave a vector of equal entries as it is: their mean is looked at, or one is added."""
        if isinstance(axis, Axis):
            self._ones[self.find(axis.basis)] = True
        return axis

    def block(self, basis: int) -> int:
        return self._block[self.find(basis)]

    def ones(self, basis: int) -> bool:
        return self._ones[self.find(basis)]

    def reason(self, basis: int) -> str:
        """Why this basis is fixed; empty if it is free."""
        root = self.find(basis)
        least = 3 if self._ones[root] else 2  # in two dimensions only the swap leaves ones as they are
        return self._reason[root] or ("it is cut into single entries" if self._block[root] < least else "")
