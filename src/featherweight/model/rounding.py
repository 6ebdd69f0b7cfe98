"""Weights held on a grid of integers, and the arithmetic of that grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.encoding import Affine, spread
from ..core.soft import Link


def limits(bits: int, signed: bool = True) -> tuple[int, int]:
    """The lowest and highest integer of a grid: symmetric around 0 (8 bits: -127 to 127), or unsigned from 0."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be from 2 to 8, not {bits}")
    high = 2 ** (bits - 1) - 1
    return (-high, high) if signed else (0, 2**bits - 1)


def quantize(values: Tensor, scale: Tensor, zero: Tensor, axis: int | None, low: int, high: int) -> Tensor:
    """The nearest integers `round(values / scale) + zero`, half to even, cut to low...high.

    `scale` and `zero` are scalars (`axis` None) or have one entry per index of `axis`. The result has the shape of
    `values`, in int8 if `low` is negative, else in uint8. Jacob et al., arXiv:1712.05877, equation 1.
    """
    steps = torch.round(values.float() / spread(scale, values, axis))
    integers = (steps + spread(zero.float(), values, axis)).clamp(low, high)
    return integers.to(torch.int8 if low < 0 else torch.uint8)


def dequantize(integers: Tensor, scale: Tensor, zero: Tensor, axis: int | None) -> Tensor:
    """The float32 values `(integers - zero) * scale` that the integers stand for."""
    return Affine(values=integers, scale=scale, zero=zero, axis=axis).decode()


class Rounding(Link, kind="affine"):
    """Hold a weight on a grid of integers; gradients pass straight through to every weight that the grid reaches.

    `scale` (float32) and `zero` (integers, default 0) are scalars (`axis` None) or have one entry per index of `axis`.
    Integers run from `low` to `high`, by default symmetric for `bits`. `forward` computes in float32 and returns the
    weight's type. Grid: Jacob et al., arXiv:1712.05877; straight-through gradient: Bengio et al., arXiv:1308.3432.
    """

    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        axis: int | None = None,
        bits: int = 8,
        low: int | None = None,
        high: int | None = None,
        shape: list[int] | None = None,
    ):
        super().__init__()
        lowest, highest = limits(bits)
        self.axis, self.bits = axis, bits
        self.low, self.high = lowest if low is None else low, highest if high is None else high
        kind = torch.int8 if self.low < 0 else torch.uint8
        if scale is not None and not bool((scale > 0).all()):
            raise ValueError("every scale must be above zero")
        scale = torch.ones(shape or []) if scale is None else scale.detach().float().clone()
        zero = torch.zeros(scale.shape) if zero is None else zero.detach().clone()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero.to(kind))

    def settings(self) -> dict[str, Any]:
        shape = list(self.scale.shape)
        return {"axis": self.axis, "bits": self.bits, "low": self.low, "high": self.high, "shape": shape}

    def extra_repr(self) -> str:
        return f"axis={self.axis}, bits={self.bits}, low={self.low}, high={self.high}"

    def forward(self, weight: Tensor) -> Tensor:
        grid = self.encode(weight).decode().to(weight.dtype)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return grid
        inside = weight.clamp(self._edge(self.low - 0.5, weight), self._edge(self.high + 0.5, weight))
        return grid + (inside - inside.detach())  # adds exact zeros; the gradient is that of `inside`

    def encode(self, weight: Tensor) -> Affine:
        integers = quantize(weight.detach(), self.scale, self.zero, self.axis, self.low, self.high)
        return Affine(values=integers, scale=self.scale, zero=self.zero, axis=self.axis, bits=self.bits)

    def _edge(self, integer: float, weight: Tensor) -> Tensor:
        return spread((integer - self.zero.float()) * self.scale, weight, self.axis).to(weight.dtype)
