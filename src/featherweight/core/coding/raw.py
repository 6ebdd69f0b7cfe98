"""Bits that no model shortens, as they are: whole bytes, then what is left of each entry bit by bit. Pure functions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]


def size(count: int, bits: int) -> int:
    """The bytes of `count` entries of `bits` bits."""
    return count * (bits // 8) + (bits % 8) * (-(-count // 8))


def put(values: Words, bits: int) -> bytes:
    """The lowest `bits` (0 to 64) of each entry of a vector."""
    whole, rest = divmod(bits, 8)
    planes = values.astype("<u8").view(np.uint8).reshape(-1, 8)
    left = [np.packbits((values >> np.uint64(8 * whole + bit)).astype(np.uint8) & 1) for bit in range(rest)]
    return b"".join([planes[:, :whole].tobytes(), *(each.tobytes() for each in left)])


def get(data: bytes, count: int, bits: int) -> Words:
    """What `put` was given; `ValueError` for another number of bytes."""
    if len(data) != size(count, bits):
        raise ValueError("another number of plain bits than entries")
    whole, rest = divmod(bits, 8)
    planes = np.zeros((count, 8), np.uint8)
    planes[:, :whole] = np.frombuffer(data, np.uint8, count * whole).reshape(count, whole)
    found = planes.view("<u8").reshape(-1).astype(np.uint64)
    packed = np.frombuffer(data, np.uint8, offset=count * whole).reshape(rest, -1 if rest else 0)
    for bit, each in enumerate(packed):
        found |= np.unpackbits(each, count=count).astype(np.uint64) << np.uint64(8 * whole + bit)
    return found
