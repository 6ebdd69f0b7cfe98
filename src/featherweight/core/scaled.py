"""Integers with one scale for each row and one for each column, both on a scale of quarter octaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .encoding import Encoding
from .packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

OCTAVE = 4
EXPONENTS = 256
FACTORS = (2**0.25, 2**0.5, 2.0, 2.0**2, 2.0**4, 2.0**8, 2.0**16, 2.0**32)  # what each bit of an exponent stands for


def powers(exponents: Tensor) -> Tensor:
    """`2**(exponents / 4)` of integers from 0 to 255, float32, by products alone: the same on every machine."""
    import torch

    whole = exponents.int()
    found = torch.ones(whole.shape, dtype=torch.float32, device=whole.device)
    for bit, factor in enumerate(FACTORS):
        found = found * torch.where((whole // 2**bit) % 2 == 1, factor, 1.0)
    return found


@dataclass(frozen=True)
class Scaled(Encoding):
    """Integers with steps: `weight[i, j, ...] = values[i, j, ...] * scale * 2**(rows[i] / 4) * 2**(columns[j] / 4)`.

    `values` (int8, or int16 with 16 bits) has the weight's shape, two dimensions or more, and is symmetric around 0;
    `rows` and `columns` (uint8) have an entry for each index of the first and of the second dimension; `scale`
    (float32) is a scalar. Steps by row and column are what coding at the least error calls for: fine where outputs
    react strongly, and where inputs are large.
    """

    kind: ClassVar[str] = "scaled"
    values: Tensor
    rows: Tensor
    columns: Tensor
    scale: Tensor
    bits: int

    @property
    def form(self) -> str:
        return f"scaled{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def parts(self) -> dict[str, Tensor]:
        values = self.values if self.bits > 8 else pack_bits(self.values.int() + 2 ** (self.bits - 1), self.bits)
        return {"values": values, "rows": self.rows, "columns": self.columns, "scale": self.scale}

    def restore(self, parts: dict[str, Tensor]) -> Tensor:
        if self.bits > 8:
            return self._floats(parts["values"], parts)
        integers = unpack_bits(parts["values"], self.bits, self.values.numel()) - 2 ** (self.bits - 1)
        return self._floats(integers.reshape(self.values.shape), parts)

    def decode(self) -> Tensor:
        return self._floats(self.values, {"rows": self.rows, "columns": self.columns, "scale": self.scale})

    def _floats(self, values: Tensor, parts: dict[str, Tensor]) -> Tensor:
        rows = powers(parts["rows"]).reshape(-1, *[1] * (values.dim() - 1))
        columns = powers(parts["columns"]).reshape(1, -1, *[1] * (values.dim() - 2))
        return values.float() * (rows * parts["scale"]) * columns
