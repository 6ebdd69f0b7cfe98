"""Weights that lie as 16-bit floats on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .encoding import Encoding
from .soft import Link

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Half(Encoding):
    """Floats of 16 bits (IEEE 754 binary16) that stand for those of 32: `values` has the weight's shape."""

    kind: ClassVar[str] = "half"
    values: Tensor

    @property
    def form(self) -> str:
        return "float16"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def parts(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def restore(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["values"].float()


class Halved(Link, kind="half"):
    """Hold a weight on the numbers that 16-bit floats can say; gradients pass straight through."""

    def forward(self, weight: Tensor) -> Tensor:
        held = weight.detach().half().to(weight.dtype)
        return held + (weight - weight.detach())  # adds exact zeros; the gradient is that of the weight

    def encode(self, weight: Tensor) -> Half:
        return Half(weight.detach().half())

    def settings(self) -> dict[str, Any]:
        return {}
