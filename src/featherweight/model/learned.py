"""Grids whose step size is learned: what stands in place of `Rounding` and `Port` while they are trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core.encoding import Affine, spread
from ..core.soft import Link
from .port import Port
from .rounding import Rounding, quantize

LEAST = 1e-8  # no step size gets smaller; a negative one would turn the grid over


class LearnedSteps(torch.autograd.Function):
    """`clamp(round(values / scale), low, high) * scale` with the gradients of LSQ (arXiv:1902.08153, section 2.1).

    The gradient passes to `values` strictly inside of the grid. That of `scale`, which the paper writes as
    `round(v) - v` inside (v = values / scale) and as the limit outside, is `(output - values inside) / scale` summed
    against the gradient of the output, times `factor`: two products instead of a mask. `scale` is a scalar or has one
    entry per index of `axis`; `low` and `high` are the limits around a zero of 0.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, scale: Tensor, axis: int | None, low: int, high: int, factor: float
    ) -> Tensor:
        steps = spread(scale, values, axis).to(values.dtype)
        # four plain passes: torch.fake_quantize_per_tensor_affine is one, but three times slower (it is not vectorized)
        output = torch.div(values, steps).round_().clamp_(low, high).mul_(steps)
        ctx.save_for_backward(values, scale, output)
        ctx.axis, ctx.low, ctx.high, ctx.factor = axis, low, high, factor
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        values, scale, output = ctx.saved_tensors
        gradient = gradients[0]
        if ctx.axis is None:
            step = float(scale)
            passed = torch.ops.aten.hardtanh_backward(gradient, values, ctx.low * step, ctx.high * step)
            total = product(gradient, output) - product(passed, values)
        else:
            steps = spread(scale, values, ctx.axis)
            inside = (values > ctx.low * steps) & (values < ctx.high * steps)
            passed = gradient * inside
            total = (gradient * output - passed * values).movedim(ctx.axis, 0).flatten(1).sum(1)
        return passed, total / scale * ctx.factor, None, None, None, None


def product(one: Tensor, other: Tensor) -> Tensor:
    """The sum of the products of all entries, in float32: a scalar."""
    return torch.dot(one.float().flatten(), other.float().flatten())


def gradient_factor(count: int, high: int) -> float:
    """What the gradient of a step size is multiplied by, for `count` values on a grid up to `high`: 1 / sqrt(count *
    high), so that step sizes and weights move alike (arXiv:1902.08153, section 2.2).
    """
    return 1 / math.sqrt(count * high)


class LearnedRounding(Link, kind="learned"):
    """Hold a weight on a grid of integers around 0 whose step sizes are trained with it.

    `scale` is a scalar (`axis` None) or has one entry per index of `axis`; integers run from `low` to `high`. Learned
    step sizes: Esser et al., arXiv:1902.08153.
    """

    def __init__(
        self,
        scale: Tensor | None = None,
        axis: int | None = None,
        bits: int = 8,
        low: int = -127,
        high: int = 127,
        shape: list[int] | None = None,
    ):
        super().__init__()
        self.axis, self.bits, self.low, self.high = axis, bits, low, high
        scale = torch.ones(shape or []) if scale is None else scale.detach().float().clone()
        self.scale = nn.Parameter(scale)

    def settings(self) -> dict[str, Any]:
        return {
            "axis": self.axis,
            "bits": self.bits,
            "low": self.low,
            "high": self.high,
            "shape": list(self.scale.shape),
        }

    def forward(self, weight: Tensor) -> Tensor:
        scale = self.scale.clamp_min(LEAST)
        factor = gradient_factor(weight.numel() // self.scale.numel(), self.high)
        return LearnedSteps.apply(weight, scale, self.axis, self.low, self.high, factor)

    def encode(self, weight: Tensor) -> Affine:
        scale = self.scale.detach().clamp_min(LEAST)
        zero = torch.zeros(scale.shape, dtype=torch.int8, device=scale.device)
        integers = quantize(weight.detach(), scale, zero, self.axis, self.low, self.high)
        return Affine(values=integers, scale=scale, zero=zero, axis=self.axis, bits=self.bits)

    def settled(self) -> Rounding:
        """The same grid with its step sizes as they are now, no longer trained."""
        return Rounding(self.scale.clamp_min(LEAST), axis=self.axis, bits=self.bits, low=self.low, high=self.high)


class LearnedPort(nn.Module):
    """Quantize an activation to integers from 0 to 2^bits - 1 with a trained step size, and back.

    The zero point stays where calibration found it. Esser et al., arXiv:1902.08153.
    """

    def __init__(self, scale: float = 1.0, zero: int = 0, bits: int = 8):
        super().__init__()
        self.scale, self.zero, self.bits = nn.Parameter(torch.tensor(float(scale))), int(zero), int(bits)

    def extra_repr(self) -> str:
        return f"zero={self.zero}, bits={self.bits}"

    def forward(self, x: Tensor) -> Tensor:
        low, high = -self.zero, 2**self.bits - 1 - self.zero
        features = x.numel() // max(1, x.shape[0])
        factor = gradient_factor(features, max(-low, high))
        return LearnedSteps.apply(x, self.scale.clamp_min(LEAST), None, low, high, factor)

    def settled(self) -> Port:
        """The same grid with its step size as it is now, no longer trained."""
        return Port(float(self.scale.detach().clamp_min(LEAST)), self.zero, self.bits)


def ternary_scale(weight: Tensor, axis: int | None) -> Tensor:
    """The step of a grid -1, 0, 1 by ternary weight networks (arXiv:1605.04711, equations 5 and 6): the mean magnitude
    of the weights whose magnitude is above 0.7 times the mean; a scalar, or one per index of `axis`.
    """
    magnitude = weight.detach().float().abs()
    rows = magnitude.reshape(1, -1) if axis is None else magnitude.movedim(axis, 0).flatten(1)
    above = rows > 0.7 * rows.mean(1, keepdim=True)
    scale = (rows * above).sum(1) / above.sum(1).clamp_min(1)
    scale = torch.where(scale > 0, scale, scale.amax().clamp_min(LEAST))
    return scale[0] if axis is None else scale


class Moments:
    """Mean and variance per channel (dimension 1) of a stream of tensors, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0.0
        self.squares: Any = 0.0

    def add(self, values: Tensor) -> None:
        """Take in every entry of `values`."""
        rows = values.detach().double().movedim(1, 0).flatten(1)
        self.count += rows.shape[1]
        self.total, self.squares = self.total + rows.sum(1), self.squares + rows.square().sum(1)

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and variance (over all entries, not one less) of each channel."""
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean**2).clamp_min(0.0)
