"""Weights as sums of entries of several tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .encoding import Encoding
from .packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Additive(Encoding):
    """Indices into several tables whose entries add up: `weight = (tables[0, indices[0]] + ...) * scale`.

    `tables` is [books, entries, length] and `indices` (uint8) [books, vectors]: each vector stands for `length`
    neighbours of the weight, which has the shape `size`. `scale` has one entry. Residual vector quantization: Juang and
    Gray, ICASSP 1982; sums of free tables: Babenko and Lempitsky, CVPR 2014; of weights: arXiv:2401.06118.
    """

    kind: ClassVar[str] = "additive"
    indices: Tensor
    tables: Tensor
    scale: Tensor
    size: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits of one index."""
        return max(1, (self.tables.shape[1] - 1).bit_length())

    @property
    def form(self) -> str:
        return f"additive{len(self.tables)}x{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def parts(self) -> dict[str, Tensor]:
        return {"indices": pack_bits(self.indices, self.bits), "tables": self.tables, "scale": self.scale}

    def restore(self, parts: dict[str, Tensor]) -> Tensor:
        indices = unpack_bits(parts["indices"], self.bits, self.indices.numel()).reshape(self.indices.shape)
        return summed(parts["tables"].float(), indices.long()).reshape(self.size) * parts["scale"].float()


def summed(tables: Tensor, indices: Tensor) -> Tensor:
    """The sum over books of the entries that `indices` [books, vectors] name in `tables` [books, entries, length]."""
    total = tables[0][indices[0]]
    for table, index in zip(tables[1:], indices[1:]):
        total = total + table[index]
    return total
