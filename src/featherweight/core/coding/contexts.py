"""What is known of an integer before it is coded: how large its row and its column have been so far.

A matrix is coded in bands of rows, a band in four passes over its diagonals: every row and every column has entries in
each pass, so that the first eighth tells where the rest is large. Only whole numbers are computed with.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .tables import LEVELS, POINT, Ints, class_of, level

BAND = 2**16  # entries of a band, about
DIAGONALS = 8
PASSES = ((0,), (1,), (2, 3), (4, 5, 6, 7))  # diagonals of each pass
BEFORE = 3  # entries of average size that every row and column is taken to have had


def bands(rows: int, columns: int) -> Iterator[slice]:
    """The rows of each band."""
    step = max(DIAGONALS, BAND // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Pass:
    """The entries that one pass over a band codes: flat places, rows, columns, and how many each of these has."""

    places: NDArray[np.int32]
    rows: NDArray[np.int32]
    columns: NDArray[np.int32]
    row_counts: Ints
    column_counts: Ints


@functools.lru_cache(maxsize=16)
def passes(rows: int, columns: int) -> tuple[Pass, ...]:
    """The passes over a band of this shape that have any entries."""
    row, column = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
    diagonal = (row + column) % DIAGONALS
    found = []
    for each in PASSES:
        places = np.flatnonzero((diagonal >= each[0]) & (diagonal <= each[-1])).astype(np.int32)
        if len(places):
            r, c = row[places], column[places]
            found.append(Pass(places, r, c, np.bincount(r, minlength=rows), np.bincount(c, minlength=columns)))
    return tuple(found)


@functools.cache
def classes_of_sums() -> NDArray[np.uint8]:
    """The class of a row's level plus a column's less that of all, from three times the lowest level on."""
    return class_of(np.arange(-3 * LEVELS, 3 * LEVELS + 1, dtype=np.int64))


@dataclass
class Sums:
    """Sums of magnitudes and counts: of all columns, of the rows of the band at hand, and of everything. `mean` (with
    `POINT` binary places) is what the average is taken to be before anything was coded.
    """

    mean: int
    columns: Ints
    column_counts: Ints
    rows: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    row_counts: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    total: int = 0
    count: int = 0

    def enter(self, rows: int) -> None:
        """Begin a band."""
        self.rows, self.row_counts = np.zeros(rows, np.int64), np.zeros(rows, np.int64)

    def classes(self, part: Pass) -> NDArray[np.uint8]:
        """The class of each entry of a pass: its row's mean times its column's, over the mean of all."""
        mean = ((self.total << POINT) + BEFORE * self.mean) // (self.count + BEFORE)
        sums = np.concatenate([self.rows, self.columns, (self.total,)]) << POINT
        counts = np.concatenate([self.row_counts, self.column_counts, (self.count,)])
        sums += BEFORE * mean
        sums[-1] = mean * (self.count + BEFORE)
        counts += BEFORE
        levels = level(sums // counts).astype(np.int16)
        rows, columns = levels[: len(self.rows)], levels[len(self.rows) : -1]
        return classes_of_sums()[(rows + (3 * LEVELS - levels[-1]))[part.rows] + columns[part.columns]]

    def add(self, magnitudes: Ints, part: Pass) -> None:
        """Count the entries of a pass. The sums of floats are exact: they stay far below 2**53."""
        self.rows += np.bincount(part.rows, magnitudes, len(self.rows)).astype(np.int64)
        self.columns += np.bincount(part.columns, magnitudes, len(self.columns)).astype(np.int64)
        self.row_counts += part.row_counts
        self.column_counts += part.column_counts
        self.total, self.count = self.total + int(magnitudes.sum()), self.count + len(magnitudes)
