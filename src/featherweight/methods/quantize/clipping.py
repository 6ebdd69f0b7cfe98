"""Ranges of activations learned by gradient: the ends of a grid move to where its rounding and clipping harm least.

Step sizes: Esser et al., arXiv:1902.08153 (LSQ); zero points: Bhalgat et al., arXiv:2004.09576 (LSQ+); learned ends of
activations began with Choi et al., arXiv:1805.06085 (PACT).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...model.port import Port


def straight(values: Tensor) -> Tensor:
    """`values` rounded half to even, with the gradient of the values themselves (arXiv:1308.3432)."""
    return values + (torch.round(values) - values).detach()


def on_grid(values: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """`values` on the points `(0...top - zero) * scale`, differentiable by all three.

    With v = values / scale, the gradient is, inside of the grid, 1 for a value, `round(v) - v` for `scale` and 0 for
    `zero`; outside 0, the integer at the end less `zero`, and `-scale` (arXiv:1902.08153, equation 3; arXiv:2004.09576,
    equations 6 and 7). `scale` and `zero` are scalars; `zero` need not be whole.
    """
    middle = straight(zero)
    return ((straight(values / scale) + middle).clamp(0, top) - middle) * scale


class LearnedRange(nn.Module):
    """Stands in place of a `Port` while its range is learned: the scale, and the zero point where something lies below
    zero.

    Both are learned as changes: `growth` is the logarithm of the scale over the one it began with, `shift` what is
    added to the zero point as a share of the highest integer. So one learning rate suits grids of any size.
    """

    def __init__(self, port: Port):
        super().__init__()
        self.start, self.growth, self.shift = port, nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
        self.shift.requires_grad_(port.zero > 0)

    @property
    def scale(self) -> Tensor:
        return self.start.scale * torch.exp(self.growth)

    @property
    def zero(self) -> Tensor:
        return (self.start.zero + self.shift * self.start.top).clamp(0, self.start.top)

    def forward(self, x: Tensor) -> Tensor:
        return on_grid(x, self.scale, self.zero, self.start.top)

    @torch.no_grad()
    def settled(self) -> Port:
        """The grid as it is now, with a whole zero point."""
        return Port(float(self.scale), round(float(self.zero)), self.start.bits)
