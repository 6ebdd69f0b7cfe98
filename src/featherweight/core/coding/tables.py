"""Tables of frequencies for integers whose mean magnitude is known: whole numbers alone, so every machine has the same.

A level counts eighths of an octave of the mean magnitude, a class quarters. Each class has a table to start from,
a discretised Gaussian with a little of a Laplace distribution, and learns from what was coded in it.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

ONE = 2**32  # fixed point of the tables
POINT = 16  # binary places of a mean
LEVELS = 64  # eighths of an octave on either side of a mean of 1
CLASSES = 64
LARGEST = 127  # magnitude that a table can hold
TOTAL = 2**16  # frequencies of a table add up to this
STRENGTH = 24  # symbols that the table to start from counts for
SHARES = (13, 3)  # Gaussian and Laplace, sixteenths

# Ratios t of the discretised Gaussians t**(n*n) with mean magnitude 2**((k - 32) / 4) for k = 0 to 63, times 2**32.
GAUSSIANS = (
    8421504, 10022349, 11929183, 14201195, 16909318, 20138683, 23991631, 28591448, 34087008, 40658593, 48525261,
    57954245, 69273075, 82885417, 99291994, 119118661, 143154622, 172405304, 208166738, 252131856, 306544548,
    374424638, 459894198, 568630787, 708409356, 889419817, 1123228136, 1417975387, 1769173825, 2154705310,
    2542937266, 2904967605, 3221410732, 3483819533, 3692588034, 3853496474, 3974605347, 4064176451, 4129582674,
    4176905175, 4210917999, 4235249204, 4252596066, 4264933864, 4273694098, 4279906650, 4284308683, 4287425948,
    4289632471, 4291193861, 4292298502, 4293079887, 4293632553, 4294023419, 4294299838, 4294495314, 4294633546,
    4294731294, 4294800415, 4294849292, 4294883854, 4294908294, 4294925575, 4294937795,
)  # fmt: skip


@functools.cache
def bounds() -> Ints:
    """The means (with `POINT` binary places) at which one level ends and the next begins; exact integer roots."""
    found = []
    for level in range(-LEVELS, LEVELS):
        power = 1 << (2 * level + 1 + 16 * (POINT + 8))  # 2**((level + 1/2) / 8) after four roots, 8 places too many
        for _ in range(4):
            power = math.isqrt(power)
        found.append(power >> 8)
    return np.array(found, np.int64)


def level(mean: Ints) -> Ints:
    """The level of each mean (`POINT` binary places), from `-LEVELS` to `LEVELS`."""
    return np.searchsorted(bounds(), mean, side="right") - LEVELS


def class_of(levels: Ints) -> NDArray[np.uint8]:
    """The class of each level; those beyond the ends belong to the ends."""
    return np.minimum(np.maximum((levels + LEVELS + 1) >> 1, 0), CLASSES - 1).astype(np.uint8)


@functools.cache
def prior(place: int, largest: int) -> Ints:
    """The table to start from for a class: frequencies of -largest to largest, about `STRENGTH * TOTAL` in all."""
    gaussian, laplace = _gaussian(GAUSSIANS[place], largest), _laplace(place, largest)
    wholes = [2 * sum(half) - half[0] for half in (gaussian, laplace)]
    half = [
        sum(
            share * STRENGTH * TOTAL * part[n] // (16 * whole)
            for share, part, whole in zip(SHARES, (gaussian, laplace), wholes)
        )
        for n in range(largest + 1)
    ]
    return np.array([*half[:0:-1], *half], np.int64)


def _gaussian(ratio: int, largest: int) -> list[int]:
    """`ratio**(n*n)` for n from 0 to `largest`, in fixed point."""
    found, factor, square = [ONE], ratio, ratio * ratio // ONE
    for _ in range(largest):
        found.append(found[-1] * factor // ONE)
        factor = factor * square // ONE
    return found


def _laplace(place: int, largest: int) -> list[int]:
    """`ratio**n` for n from 0 to `largest`, in fixed point, with the mean magnitude of the class."""
    mean = math.isqrt(math.isqrt(1 << (place - 32 + 256))) >> 32  # 2**((place - 32) / 4), 32 binary places
    ratio = (math.isqrt(ONE * ONE + mean * mean) - ONE) * ONE // mean
    found = [ONE]
    for _ in range(largest):
        found.append(found[-1] * ratio // ONE)
    return found


def frequencies(tables: Ints) -> Ints:
    """Frequencies of at least 1 that add up to `TOTAL` in every row, in proportion to the entries of `tables`."""
    found = tables * (TOTAL - tables.shape[1]) // tables.sum(1, keepdims=True) + 1
    rows = np.arange(len(found))
    found[rows, found.argmax(1)] += TOTAL - found.sum(1)
    return found
