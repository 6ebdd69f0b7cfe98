"""adapt.ia3: a factor for each output or input of chosen linear layers."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import nn

from featherweight.core.context import Context
from featherweight.model.adapters import Scaled

from . import peft
from .merging import MergingStep


class ActivationScaling(MergingStep, kind="adapt.ia3"):
    """Train a factor for each output of the chosen linear layers, with the base frozen in the form it is stored in.

    Layers whose names match a glob of `inputs` get factors for their inputs instead (the second layer of a feed-forward
    network in the paper, which scales keys, values and that). peft does the mathematics. For `merge` and `bound` see
    `MergingStep`: factors of outputs go into scales of integers without rounding.
    """

    paper: ClassVar[str] = "arXiv:2205.05638"
    packages: ClassVar[tuple[str, ...]] = ("peft",)
    extra: ClassVar[str] = "adapters"

    inputs: tuple[str, ...] = ()

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        layers = self.chosen(model, ctx)
        if not layers:
            return model
        for glob in self.inputs:
            self.check_name(glob, layers, layers, ctx)
        of_inputs = [name for name in layers if any(fnmatchcase(name, glob) for glob in self.inputs)]
        config = peft.library().IA3Config(
            target_modules=peft.pattern(layers), feedforward_modules=peft.pattern(of_inputs) if of_inputs else []
        )
        model = peft.put_around(model, config, layers)
        around: list[Any] = [model.get_submodule(name) for name in layers]
        loss = self.learn(model, [layer.ia3_l[peft.ADAPTER] for layer in around], ctx)
        for name, made in peft.taken_off(model, layers, _turned).items():
            assert isinstance(made, Scaled)
            ctx.change(name, f"a factor for each of {made.size} {made.of}, last loss {loss:.4g}")
        return self.merged(model, list(layers), ctx)


def _turned(layer: Any) -> Scaled:
    """What stays of peft's layer."""
    factors = layer.ia3_l[peft.ADAPTER].detach().flatten()
    made = Scaled(len(factors), "inputs" if layer.is_feedforward else "outputs")
    made.to(factors.device, layer.base_layer.weight.dtype).base = layer.base_layer
    with torch.no_grad():
        made.gain.copy_(factors)
    return made.eval()
