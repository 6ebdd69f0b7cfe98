"""Matrices of integers as a stream of bits near their entropy: adaptive contexts and a range coder. Pure functions.

After context-adaptive arithmetic coding of quantized networks (DeepCABAC, arXiv:1907.11900), with contexts from the
magnitudes of rows and columns, and whole vectors of entries of one context coded at a time. The range coder is that of
the library `constriction`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from . import raw
from .contexts import Sums, bands, passes
from .tables import CLASSES, LARGEST, LEVELS, POINT, TOTAL, Ints, bounds, class_of, frequencies, level, prior

Model = Any  # constriction's Categorical, of which it says no type
Move = Callable[[NDArray[np.int32], NDArray[np.int32], Ints, list[Model]], NDArray[np.int32]]
USUAL = 0.99  # of the entries are to have few bits beside those that are coded
SHORT = 64  # entries of a vector that are too few to learn from
GAIN = TOTAL  # what one coded entry adds to its place in a table


@dataclass(frozen=True)
class Settings:
    """What both sides must know beside the shape: `entry = (high << shift) + low + offset`.

    `low` has `shift` bits that are stored as they are. `high` is coded with contexts, cut off at `largest` in
    magnitude; of the `beyond` entries that reach it, the rest is stored in `tail` bits each. `start` is the level of
    the mean magnitude; with `even` a sign says nothing: tables are kept symmetric.
    """

    offset: int
    shift: int
    largest: int
    start: int
    even: bool
    tail: int
    beyond: int

    @classmethod
    def fit(cls, values: NDArray[np.int64]) -> Settings:
        """Settings for integers [rows, columns] that are not empty."""
        low, high = int(values.min()), int(values.max())
        offset = 0 if low < 0 <= high else int(np.median(values))
        place = int(USUAL * (values.size - 1))
        usual = int(np.partition(np.abs(values - offset), place, axis=None)[place])
        shift = max(0, usual.bit_length() - 6)
        coded = (values - offset) >> shift
        reach = np.abs(coded)
        most = int(reach.max())
        largest = min(max(1, most), LARGEST)
        tail = (most - largest).bit_length()
        mean = (int(np.minimum(reach, largest).sum()) << POINT) // values.size
        even = abs(float(np.sign(coded).sum())) <= 4 * values.size**0.5
        beyond = int((reach >= largest).sum()) if tail else 0
        return cls(offset, shift, largest, int(level(np.array([mean]))[0]), even, tail, beyond)

    def room(self, count: int) -> int:
        """The bytes of what is stored as it is, for so many entries."""
        return raw.size(count, self.shift) + raw.size(self.beyond, self.tail)


class _Tables:
    """The tables of all classes of one matrix, made and changed as entries are coded."""

    def __init__(self, settings: Settings):
        self.largest, self.even = settings.largest, settings.even
        self.tables = np.zeros((CLASSES, 2 * settings.largest + 1), np.int64)
        self.made = np.zeros(CLASSES, bool)

    def models(self, classes: Ints) -> list[Model]:
        """The distribution of each of these classes; frequencies are whole and add up to a power of two, so that the
        floats are exact.
        """
        for place in classes[~self.made[classes]].tolist():
            self.tables[place] = prior(place, self.largest)
            self.made[place] = True
        found = frequencies(self.tables[classes]) / np.float64(TOTAL)
        return [constriction.stream.model.Categorical(each, perfect=False) for each in found]

    def learn(self, classes: Ints, sizes: Ints, symbols: NDArray[np.int32]) -> None:
        """Count the symbols of these classes, one class after the other."""
        width = self.tables.shape[1]
        keys = np.repeat(np.arange(len(classes)) * width, sizes) + symbols
        counts = np.bincount(keys, minlength=len(classes) * width).reshape(-1, width) * GAIN
        self.tables[classes] += counts + counts[:, ::-1] >> 1 if self.even else counts


def encode(values: NDArray[np.int64], settings: Settings) -> bytes:
    """Integers [rows, columns], at least one, as bytes."""
    coder = constriction.stream.queue.RangeEncoder()
    shifted = values - settings.offset
    high = shifted >> settings.shift
    symbols = (np.clip(high, -settings.largest, settings.largest) + settings.largest).astype(np.int32)

    def put(flat: NDArray[np.int32], places: NDArray[np.int32], sizes: Ints, models: list[Model]) -> NDArray[np.int32]:
        found = flat[places]
        for end, size, model in zip(np.cumsum(sizes).tolist(), sizes.tolist(), models):
            coder.encode(found[end - size : end], model)
        return found

    _code(symbols, settings, put)
    data = coder.get_compressed().astype("<u4").tobytes()
    data += raw.put(shifted.reshape(-1).view(np.uint64), settings.shift)
    rest = np.abs(high.reshape(-1)) - settings.largest
    return data + raw.put(rest[rest >= 0].view(np.uint64), settings.tail)


def decode(data: bytes, shape: tuple[int, int], settings: Settings) -> NDArray[np.int64]:
    """The integers that `encode` was given; any bytes give some integers, or `ValueError`."""
    symbols = np.zeros(shape, np.int32)
    end = len(data) - settings.room(symbols.size)
    if end < 0 or end % 4:
        raise ValueError("no whole number of words")
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(data, "<u4", end // 4).astype(np.uint32))

    def get(flat: NDArray[np.int32], places: NDArray[np.int32], sizes: Ints, models: list[Model]) -> NDArray[np.int32]:
        found = np.concatenate([coder.decode(model, size) for size, model in zip(sizes.tolist(), models)])
        flat[places] = found
        return found

    try:
        _code(symbols, settings, get)
    except (AssertionError, OverflowError) as error:
        raise ValueError(f"no stream of this coder: {error}") from error
    high = symbols.astype(np.int64) - settings.largest
    middle = end + raw.size(symbols.size, settings.shift)
    if settings.tail:
        _lengthen(high.reshape(-1), settings, data[middle:])
    low = raw.get(data[end:middle], symbols.size, settings.shift).view(np.int64).reshape(shape)
    return (high << settings.shift) + low + settings.offset


def _lengthen(high: Ints, settings: Settings, data: bytes) -> None:
    """Add to the entries that were cut off what is stored of them, in place."""
    places = np.flatnonzero(np.abs(high) == settings.largest)
    if len(places) != settings.beyond:
        raise ValueError("another number of large entries")
    high[places] += np.sign(high[places]) * raw.get(data, settings.beyond, settings.tail).view(np.int64)


def _code(symbols: NDArray[np.int32], settings: Settings, move: Move) -> None:
    """Go through all entries: `move` writes those at some places, sorted by class, or reads them; it gives them.

    The entries of a short vector are all of the class that the settings say.
    """
    columns, tables = symbols.shape[1], _Tables(settings)
    if symbols.size <= SHORT and 1 in symbols.shape:
        only = class_of(level(np.array([_mean(settings)], np.int64))).astype(np.int64)
        places = np.arange(symbols.size, dtype=np.int32)
        move(symbols.reshape(-1), places, np.array([symbols.size]), tables.models(only))
        return
    sums = Sums(_mean(settings), np.zeros(columns, np.int64), np.zeros(columns, np.int64))
    for band in bands(*symbols.shape):
        part = symbols[band]
        flat = part.reshape(-1)
        sums.enter(len(part))
        for each in passes(*part.shape):
            classes = sums.classes(each)
            counts = np.bincount(classes, minlength=CLASSES)
            used = np.flatnonzero(counts)
            places = each.places[np.argsort(classes, kind="stable")]
            found = move(flat, places, counts[used], tables.models(used))
            tables.learn(used, counts[used], found)
            sums.add(np.abs(flat[each.places] - settings.largest), each)


def _mean(settings: Settings) -> int:
    """The mean (with `POINT` binary places) at which the level `start` begins."""
    return int(bounds()[min(max(settings.start + LEVELS - 1, 0), 2 * LEVELS - 1)])
