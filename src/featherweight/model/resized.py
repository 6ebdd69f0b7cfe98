"""A network that computes on its images at a fraction of their height and width."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from torch import Tensor, nn


class Resized(nn.Module):
    """A model `base` whose `images` (names of inputs N x C x H x W) are resized to `factor` of their height and width.

    `names` are the inputs in the order in which they may be given by position. Howard et al., arXiv:1704.04861, section
    3.4 (the resolution multiplier).
    """

    def __init__(self, factor: float, images: Sequence[str], names: Sequence[str]):
        super().__init__()
        self.factor, self.images, self.names = factor, list(images), list(names)
        self.base: nn.Module = nn.Identity()

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args)), **kwargs}
        return self.base(
            **{name: resized(each, self.factor) if name in self.images else each for name, each in inputs.items()}
        )


def resized(images: Tensor, factor: float) -> Tensor:
    """`images` [N, C, H, W] with `factor` of their height and width, bilinear, without a filter before it."""
    size = [scaled(side, factor) for side in images.shape[2:]]
    return nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=False)


def scaled(side: int, factor: float) -> int:
    """`factor` of the pixels of one side, to the nearest whole number; in integers, so that it can be exported where
    sides are free.
    """
    share = Fraction(factor).limit_denominator(1000)
    return (2 * side * share.numerator + share.denominator) // (2 * share.denominator)
