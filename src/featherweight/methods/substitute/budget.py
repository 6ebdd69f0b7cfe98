"""Which depthwise and pointwise pair, if any, stands for each layer within a budget of multiply-accumulates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.blocks import observed
from ...core.context import Context
from ...core.errors import TaskError
from ...core.knapsack import choose
from ...model.cost import forward_macs


@dataclass(frozen=True)
class Option:
    """A depthwise kernel [inputs, multiplier, places] and a pointwise one [outputs, inputs, multiplier] that may stand
    for a layer; `missed` is the share of the energy of its outputs that they miss, `energy` [inputs, multiplier] the
    mean square of what the depthwise kernels give.
    """

    multiplier: int
    depthwise: Tensor
    pointwise: Tensor
    missed: float
    energy: Tensor

    @property
    def parameters(self) -> int:
        return self.depthwise.numel() + self.pointwise.numel()


@torch.no_grad()
def layer_macs(model: nn.Module, names: Iterable[str], example: Mapping[str, Tensor]) -> dict[str, float]:
    """Multiply-accumulates of each of these convolutions on `example`, and, under "", of the whole model."""
    found = dict.fromkeys(names, 0.0)

    def note(name: str, output: Any) -> None:
        weight = model.get_submodule(name).weight
        found[name] += float(output.numel() // len(weight) * weight.numel())  # type: ignore[arg-type,operator]

    hooks = {name: (lambda _given, output, name=name: note(name, output)) for name in found}
    observed(model.eval(), (), {key: tensor.clone() for key, tensor in example.items()}, hooks)
    return found | {"": forward_macs(model, example)}


def chosen(
    options: Mapping[str, list[Option]], macs: Mapping[str, float], keep: float, ctx: Context
) -> dict[str, list[Option]]:
    """The option of each layer, or none, with which `keep` of the model's multiply-accumulates are left and the shares
    of energy that the layers miss add up to the least; a layer without one is reported.

    `macs` are those of the layers, and of the model under "". Raises `TaskError` if so few cannot be reached.
    """
    names = list(options)
    whole = {name: macs[name] for name in names}
    sizes = {name: _weights(options[name][0]) for name in names}
    costs = [[whole[name], *(whole[name] * each.parameters / sizes[name] for each in options[name])] for name in names]
    losses = [[0.0, *(each.missed for each in options[name])] for name in names]
    rest = macs[""] - sum(whole.values())
    least = (rest + sum(map(min, costs))) / macs[""]
    largest = keep * macs[""] - rest
    if not names or least > keep:
        raise TaskError(f"keep={keep:g} of the multiply-accumulates cannot be reached: at least {least:.3f} are left")
    found = {}
    for name, place in zip(names, choose(costs, losses, largest).options(largest)):
        if place:
            found[name] = [options[name][place - 1]]
        else:
            ctx.leave(name, f"within keep={keep:g} this layer can stay as it is")
    return found


def _weights(option: Option) -> int:
    """The number of weights of the layer that an option stands for: outputs x inputs x places."""
    return option.pointwise.shape[0] * option.depthwise.shape[0] * option.depthwise.shape[2]
