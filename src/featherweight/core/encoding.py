"""Encodings: how a weight is stored when it is not stored as plain floats. Methods make them, targets write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Encoding:
    """A stored form of one weight; `decode` gives the floats that it stands for."""

    kind: ClassVar[str] = ""

    @property
    def form(self) -> str:
        """The name by which a target says that it carries this: "int8", "uint4", "sparse"..."""
        raise NotImplementedError(f"{type(self).__name__} must name its form")

    def decode(self) -> Tensor:
        """The plain weight, float32, of the original shape."""
        raise NotImplementedError(f"{type(self).__name__} must decode itself")


@dataclass(frozen=True)
class Affine(Encoding):
    """Integers with a scale and a zero point: `weight = (values - zero) * scale`.

    `values` has the weight's shape, in int8 or uint8 even below 8 bits. `scale` (float32) and `zero` (the type of
    `values`) are scalars (per tensor, `axis` None) or have one entry per index of `axis` (per channel). Jacob et al.,
    arXiv:1712.05877.
    """

    kind: ClassVar[str] = "affine"
    values: Tensor
    scale: Tensor
    zero: Tensor
    axis: int | None = None
    bits: int = 8

    @property
    def form(self) -> str:
        return f"{'int' if self.values.dtype.is_signed else 'uint'}{self.bits}"

    def decode(self) -> Tensor:
        return (self.values.float() - spread(self.zero.float(), self.values, self.axis)) * spread(
            self.scale, self.values, self.axis
        )


@dataclass(frozen=True)
class Sparse(Encoding):
    """Floats of which only some positions are kept; the others are zero. `keep` is a boolean mask of the weight's
    shape.
    """

    kind: ClassVar[str] = "sparse"
    values: Tensor
    keep: Tensor

    @property
    def form(self) -> str:
        return "sparse"

    def decode(self) -> Tensor:
        return self.values * self.keep


def spread(entry: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """Reshape per-channel entries so that they broadcast against `like` along `axis`; scalars pass through."""
    if axis is None or entry.dim() == 0:
        return entry
    shape = [1] * like.dim()
    shape[axis] = -1
    return entry.reshape(shape)
