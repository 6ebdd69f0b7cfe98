"""What a file says of a weight that it holds packed, and whether the bytes that lie there bear it out."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .encoding import Affine, Encoding

NOTE = re.compile(r"(\S+) (\d+(?:x\d+)*)")
SLACK = 1.25  # kernels pad rows to whole blocks; a target may accept so much more


@dataclass(frozen=True)
class Packed:
    """The form and the shape of a weight whose bytes show neither: what a file notes beside its name."""

    form: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, encoding: Encoding) -> Packed:
        return cls(encoding.form, encoding.shape)

    @classmethod
    def read(cls, note: str, size: int) -> Packed | None:
        """What `note` says of `size` bytes; None if it says nothing, or if so many bytes are not of that form."""
        match = NOTE.fullmatch(note)
        if match is None:
            return None
        found = cls(match.group(1), tuple(int(part) for part in match.group(2).split("x")))
        return found if size <= found.largest else None

    def __str__(self) -> str:
        return f"{self.form} {'x'.join(map(str, self.shape))}"

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @property
    def largest(self) -> int:
        """Bytes that this form may take at most: the number at its end is bits per weight or index (2x3: two of 3)."""
        digits = re.search(r"(?:(\d+)x)?(\d+)$", self.form)
        bits = int(digits.group(1) or 1) * int(digits.group(2)) if digits else 32
        bits = bits if bits <= 8 else 16 if bits <= 16 else 32  # more than 8 are not packed
        return math.ceil(self.entries * bits / 8 * SLACK) + 8


def whole_bytes(encoding: Encoding) -> bool:
    """Whether one byte holds one weight, with one scale, or one per channel: what needs no packing and no note."""
    if not isinstance(encoding, Affine):
        return False
    return encoding.bits == 8 and encoding.group is None and not encoding.zero.is_floating_point()
