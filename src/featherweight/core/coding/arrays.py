"""Any array as bytes near its entropy: integers, floats on a grid, other floats, and whatever else. Pure functions.

An array comes as [rows, columns] of integers, or of the bit patterns of floats.
"""

from __future__ import annotations

import zlib
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from . import integers, raw
from .integers import Settings
from .raw import Words
from .tables import LARGEST, LEVELS

FINEST = 2**20  # largest magnitude of an integer on whose grid floats are tried
SAMPLE = 1024  # entries that are looked at first


@dataclass(frozen=True)
class Layout:
    """The bits of a kind of float: those of the exponent and of the mantissa."""

    exponent: int
    mantissa: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


LAYOUTS = {
    "float16": Layout(5, 10),
    "bfloat16": Layout(8, 7),
    "float32": Layout(8, 23),
    "float64": Layout(11, 52),
}


@dataclass(frozen=True)
class Coded:
    """An array in bytes, by which `method`, and the whole numbers that decoding needs beside the shape."""

    method: str
    settings: tuple[int, ...]
    data: bytes


# -- integers ---------------------------------------------------------------------------------------------------------
def code_integers(values: NDArray[np.int64]) -> Coded | None:
    """Integers [rows, columns]; None where they are too far apart to be told from each other in 63 bits."""
    if values.size == 0:
        return Coded("constant", (0,), b"")
    low, high = int(values.min()), int(values.max())
    if low == high:
        return Coded("constant", (low,), b"")
    if high - low >= 2**62 or max(-low, high) >= 2**62:
        return None
    settings = Settings.fit(values)
    return Coded("integers", _plain(settings), integers.encode(values, settings))


def decode_integers(coded: Coded, shape: tuple[int, int]) -> NDArray[np.int64]:
    """The integers, [rows, columns]; `ValueError` if that is not what the bytes hold."""
    if coded.method == "constant":
        (value,) = _numbers(coded, 1)
        if not -(2**63) <= value < 2**63:
            raise ValueError("an integer beyond int64")
        return np.full(shape, value, np.int64)
    if coded.method != "integers":
        raise ValueError(f"no integers but {coded.method}")
    return integers.decode(coded.data, shape, _settings(_numbers(coded, 7)))


def _plain(settings: Settings) -> tuple[int, ...]:
    return tuple(int(each) for each in astuple(settings))


def _settings(numbers: tuple[int, ...]) -> Settings:
    offset, shift, largest, start, even, tail, beyond = numbers
    narrow = 0 <= shift <= 62 and 1 <= largest <= LARGEST and 0 <= tail <= 62 - shift and 0 <= beyond < 2**40
    if not (narrow and even in (0, 1) and abs(start) <= LEVELS and abs(offset) < 2**62):
        raise ValueError("settings out of range")
    return Settings(offset, shift, largest, start, bool(even), tail, beyond)


def _numbers(coded: Coded, count: int) -> tuple[int, ...]:
    if len(coded.settings) != count or any(type(each) is not int or abs(each) >= 2**64 for each in coded.settings):
        raise ValueError("settings of another method")
    return coded.settings


# -- floats -----------------------------------------------------------------------------------------------------------
def code_floats(patterns: Words, layout: Layout) -> Coded:
    """Bit patterns of floats, [rows, columns]: as multiples of a power of two where that takes fewer bytes."""
    if patterns.size == 0 or bool((patterns == patterns.flat[0]).all()):
        return Coded("constant", (int(patterns.flat[0]) if patterns.size else 0,), b"")
    split = _split(patterns, layout)
    grid = _on_grid(patterns, layout)
    return split if grid is None or len(grid.data) >= len(split.data) else grid


def decode_floats(coded: Coded, shape: tuple[int, int], layout: Layout) -> Words:
    """The bit patterns, [rows, columns]; `ValueError` if that is not what the bytes hold."""
    if coded.method == "constant":
        (pattern,) = _numbers(coded, 1)
        if pattern < 0 or pattern >> layout.bits:
            raise ValueError("more bits than such a float has")
        return np.full(shape, pattern, np.uint64)
    if coded.method == "grid":
        return _from_grid(coded, shape, layout)
    if coded.method != "floats":
        raise ValueError(f"no floats but {coded.method}")
    return _joined(coded, shape, layout)


def _split(patterns: Words, layout: Layout) -> Coded:
    """Exponents through the coder; of entries that are not 0, sign and mantissa as they are, less what ends in zeros.

    The symbol of an entry is its exponent plus 1, or 0 where no bit of it is set.
    """
    mantissas = patterns & np.uint64(2**layout.mantissa - 1)
    together = int(np.bitwise_or.reduce(mantissas, axis=None))
    cut = layout.mantissa if not together else (together & -together).bit_length() - 1
    signs = patterns >> np.uint64(layout.bits - 1)
    full = patterns != 0
    rest = (mantissas >> np.uint64(cut) | signs << np.uint64(layout.mantissa - cut))[full]
    exponents = (patterns >> np.uint64(layout.mantissa)) & np.uint64(2**layout.exponent - 1)
    symbols = np.where(full, exponents.astype(np.int64) + 1, 0)
    settings = Settings.fit(symbols)
    data = integers.encode(symbols, settings) + raw.put(rest, 1 + layout.mantissa - cut)
    return Coded("floats", (cut, len(rest), *_plain(settings)), data)


def _joined(coded: Coded, shape: tuple[int, int], layout: Layout) -> Words:
    cut, count, *numbers = _numbers(coded, 9)
    if not (0 <= cut <= layout.mantissa and 0 <= count <= shape[0] * shape[1]):
        raise ValueError("settings out of range")
    end = len(coded.data) - raw.size(count, 1 + layout.mantissa - cut)
    if end < 0:
        raise ValueError("too few bytes")
    symbols = integers.decode(coded.data[:end], shape, _settings(tuple(numbers)))
    if int(symbols.min()) < 0 or int(symbols.max()) > 2**layout.exponent:
        raise ValueError("an exponent that such a float cannot have")
    places = np.flatnonzero(symbols)
    if len(places) != count:
        raise ValueError("another number of mantissas than floats that are not 0")
    rest = raw.get(coded.data[end:], count, 1 + layout.mantissa - cut)
    signs = rest >> np.uint64(layout.mantissa - cut)
    mantissas = (rest << np.uint64(cut)) & np.uint64(2**layout.mantissa - 1)
    found = np.zeros(symbols.size, np.uint64)
    exponents = (symbols.reshape(-1)[places] - 1).astype(np.uint64)
    found[places] = mantissas | exponents << np.uint64(layout.mantissa) | signs << np.uint64(layout.bits - 1)
    return found.reshape(shape)


def _on_grid(patterns: Words, layout: Layout) -> Coded | None:
    """Floats as integers times a power of two; None where the integers would be large, or there are none."""
    sample = patterns.reshape(-1)[:SAMPLE]
    if _grid(sample, layout) is None or (found := _grid(patterns, layout)) is None:
        return None
    values, power = found
    coded = code_integers(values)
    assert coded is not None
    return None if coded.method != "integers" else Coded("grid", (power, *coded.settings), coded.data)


def _grid(patterns: Words, layout: Layout) -> tuple[NDArray[np.int64], int] | None:
    """Integers and the power of two that they are multiples of; None where they would not be exact or small."""
    exponents = ((patterns >> np.uint64(layout.mantissa)) & np.uint64(2**layout.exponent - 1)).astype(np.int64)
    signs = patterns >> np.uint64(layout.bits - 1) != 0
    full = patterns != 0
    if not full.any():
        return np.zeros(patterns.shape, np.int64), 0
    if bool(((exponents == 0) & full).any()) or int(exponents.max()) == 2**layout.exponent - 1:
        return None  # subnormal numbers, -0, infinities
    mantissas = (patterns & np.uint64(2**layout.mantissa - 1)).astype(np.int64) + 2**layout.mantissa
    zeros = np.log2(mantissas & -mantissas).astype(np.int64)  # exact: powers of two
    power = int((exponents + zeros)[full].min())
    if int(exponents[full].max()) + layout.mantissa + 1 - power > FINEST.bit_length() - 1:
        return None
    values = np.where(full, _shifted(mantissas, np.where(full, exponents - power, 0)), 0)
    return np.where(signs, -values, values), power


def _shifted(values: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Each value times two to the power of its `places`, without what then lies behind the point."""
    return (values << np.maximum(places, 0)) >> np.maximum(-places, 0)


def _from_grid(coded: Coded, shape: tuple[int, int], layout: Layout) -> Words:
    power, *numbers = _numbers(coded, 8)
    values = integers.decode(coded.data, shape, _settings(tuple(numbers)))
    magnitudes, full = np.abs(values), values != 0
    if int(magnitudes.max()) >= FINEST or abs(power) >= 2**12:
        raise ValueError("an integer beyond the grid")
    above = np.frexp(magnitudes.astype(np.float64))[1].astype(np.int64) - (layout.mantissa + 1)  # exact below 2**53
    exponents = np.where(full, power + above, 1)
    if int(exponents.min()) < 1 or int(exponents.max()) >= 2**layout.exponent - 1:
        raise ValueError("an exponent that such a float cannot have")
    mantissas = _shifted(magnitudes, -above) & (2**layout.mantissa - 1)
    found = mantissas | exponents << layout.mantissa | (values < 0).astype(np.int64) << (layout.bits - 1)
    return np.where(full, found, 0).astype(np.uint64)


# -- whatever else ----------------------------------------------------------------------------------------------------
def code_bytes(data: bytes) -> Coded:
    """Bytes, deflated."""
    return Coded("bytes", (), zlib.compress(data, 9))


def decode_bytes(coded: Coded, size: int) -> bytes:
    """The `size` bytes; `ValueError` if that is not what the stream holds."""
    if coded.method == "constant" and size == 0:
        return b""
    if coded.method != "bytes":
        raise ValueError(f"no bytes but {coded.method}")
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(coded.data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(found) != size or not stream.eof or stream.unused_data:
        raise ValueError("another number of bytes")
    return found
