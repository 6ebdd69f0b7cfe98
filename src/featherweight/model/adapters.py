"""Linear layers with an adapter beside them: what is left of an adapter once it is trained."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.adapted import Adapted


class LowRank(Adapted):
    """A layer `base` with a product of two thin linear layers beside it: `base(x) + up(down(x))`.

    With `gain` the sum is multiplied by a factor for each output and `shift` is added, so that only the weight, not the
    bias, is scaled (DoRA). Takes [..., inputs], gives [..., outputs]. Low rank: Hu et al., arXiv:2106.09685 (its
    alpha over rank is part of `up`); magnitudes: Liu et al., arXiv:2402.09353.
    """

    free: ClassVar[dict[str, int]] = {"down.weight": 0, "up.weight": 1}

    def __init__(self, inputs: int, outputs: int, rank: int, magnitude: bool = False):
        super().__init__()
        self.inputs, self.outputs, self.rank, self.magnitude = inputs, outputs, rank, magnitude
        self.base: nn.Module = nn.Identity()
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        if magnitude:
            self.gain, self.shift = nn.Parameter(torch.ones(outputs)), nn.Parameter(torch.zeros(outputs))

    def extra_repr(self) -> str:
        return f"rank={self.rank}"

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x) + self.up(self.down(x))
        return y * self.gain + self.shift if self.magnitude else y


class Scaled(Adapted):
    """A layer `base` whose inputs or outputs are multiplied by a factor each.

    `of` is what is multiplied, `size` how many of them there are. Liu et al. (IA3), arXiv:2205.05638.
    """

    def __init__(self, size: int, of: Literal["inputs", "outputs"] = "outputs"):
        super().__init__()
        self.size, self.of = size, of
        self.base: nn.Module = nn.Identity()
        self.gain = nn.Parameter(torch.ones(size))

    def extra_repr(self) -> str:
        return f"of={self.of}"

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x * self.gain) if self.of == "inputs" else self.base(x) * self.gain


class Bottleneck(Adapted):
    """A layer `base` and behind it a narrow network with a shortcut around: `y + up(f(down(y)))` for `y = base(x)`.

    `f` is `activation`. `up` starts at 0, so that the layer starts as it was. Houlsby et al., arXiv:1902.00751.
    """

    free: ClassVar[dict[str, int]] = {"down.weight": 0, "down.bias": 0, "up.weight": 1}

    def __init__(self, outputs: int, size: int, activation: Literal["gelu", "relu"] = "gelu"):
        super().__init__()
        self.outputs, self.size, self.activation = outputs, size, activation
        self.base: nn.Module = nn.Identity()
        self.down, self.up = nn.Linear(outputs, size), nn.Linear(size, outputs)
        if not self.up.weight.is_meta:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def extra_repr(self) -> str:
        return f"size={self.size}, {self.activation}"

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        inner = self.down(y)
        return y + self.up(nn.functional.gelu(inner) if self.activation == "gelu" else torch.relu(inner))


@torch.no_grad()
def low_rank(base: nn.Linear, down: Tensor, up: Tensor, magnitude: Tensor | None = None) -> LowRank:
    """`base` with the update `up @ down` ([outputs, rank] by [rank, inputs]) beside it.

    `magnitude` [outputs] is the length that each row of the updated weight gets (DoRA).
    """
    made = LowRank(down.shape[1], up.shape[0], down.shape[0], magnitude is not None)
    made.base = base
    made.down.weight, made.up.weight = nn.Parameter(down.clone()), nn.Parameter(up.clone())
    if magnitude is not None:
        made.gain = nn.Parameter(row_gain(base.weight, down, up, magnitude))
        bias = torch.zeros_like(made.gain) if base.bias is None else base.bias.detach()
        made.shift = nn.Parameter((1 - made.gain) * bias)
    return made.to(base.weight.device)


def row_gain(weight: Tensor, down: Tensor, up: Tensor, magnitude: Tensor) -> Tensor:
    """What brings the rows of `weight + up @ down` to these lengths (arXiv:2402.09353, equation 5): [outputs]."""
    return magnitude / (weight + up @ down).norm(dim=1)


@torch.no_grad()
def merged_values(module: Adapted) -> tuple[Tensor, Tensor | None]:
    """The weight [outputs, inputs] and the bias of the one linear layer that `module`, a linear layer with an adapter,
    is equal to. Raises `TypeError` for an adapter that no linear layer is equal to.
    """
    base = module.base
    assert isinstance(base, nn.Linear)
    weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
    if isinstance(module, LowRank):
        weight = weight + module.up.weight @ module.down.weight
        if not module.magnitude:
            return weight, bias
        shift = module.shift if bias is None else module.gain * bias + module.shift
        return module.gain[:, None] * weight, shift if bias is not None or bool(shift.any()) else None
    if isinstance(module, Scaled) and module.of == "inputs":
        return weight * module.gain, bias
    if isinstance(module, Scaled):
        return module.gain[:, None] * weight, None if bias is None else module.gain * bias
    raise TypeError(f"{type(module).__name__} is no linear function")


def row_factor(module: Adapted) -> Tensor | None:
    """By what an adapter multiplies the rows of its base's weight; None if it does not."""
    gain = getattr(module, "gain", None)
    inputs = isinstance(module, Scaled) and module.of == "inputs"
    return None if gain is None or inputs else gain.detach()
