"""sparse.targeted_dropout: the weights that would be pruned are dropped in training, and pruned after it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context
from featherweight.core.fit import Training
from featherweight.core.step import Between, Trait
from featherweight.model.masks import links_of, mask_on, maskable, put_mask, zeros
from featherweight.model.matrices import TRANSPOSED
from featherweight.model.select import LayerStep

from .noise import candidates, risen


class Dropped(nn.Module):
    """A weight of which the `share` of least magnitude in each output (index of `axis`) is zero, each with the chance
    `rate`.
    """

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        self.share, self.rate, self.axis = 0.0, 0.0, axis

    def forward(self, weight: Tensor) -> Tensor:
        if not self.training or not self.share:
            return weight
        chance = torch.rand(weight.shape, device=weight.device) < self.rate
        return weight.masked_fill(candidates(weight, self.share, self.axis) & chance, 0.0)


class TargetedDropout(LayerStep, Training, kind="sparse.targeted_dropout"):
    """Train while the smallest weights of each output are dropped at random, so that they can go; then prune them.

    `sparsity` is the share of each output's weights that are aimed at, and that are zero and held there afterwards; it
    rises from nothing during the first share `ramp` of the training. `rate` is the chance of each of them to be dropped
    in a step; after the ramp it rises too, to 1 at the end, so that statistics of batches are those of the network that
    is left. Weights that are zero already count among the smallest. Biases, norms, embeddings and shared weights are
    left alone. Raises `TaskError` without training data, `NotFinite` if the loss leaves the finite numbers.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.TRAINABLE
    takes: ClassVar[Trait] = Trait.RESHAPABLE
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:1905.13678"

    sparsity: Annotated[float, Field(gt=0, lt=1), Between(0.3, 0.95)] = 0.5
    rate: Annotated[float, Field(gt=0, le=1)] = 0.66
    ramp: Annotated[float, Field(ge=0, lt=1)] = 0.5

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        chosen = maskable(self, model, ctx)
        if not chosen:
            return model
        noise = {name: Dropped(int(isinstance(layer, TRANSPOSED))) for name, layer in chosen.items()}
        for name, layer in chosen.items():
            parametrize.register_parametrization(layer, "weight", noise[name])

        def during(_model: nn.Module, t: float) -> None:
            share, rate = risen(t, self.ramp, self.sparsity, self.rate)
            for each in noise.values():
                each.share, each.rate = share, rate

        loss = ctx.fit(model, self, during=during, text=self.kind)
        for name, layer in chosen.items():
            _remove(layer, noise[name])
            put_mask(layer, ~candidates(layer.weight, self.sparsity, noise[name].axis))  # type: ignore[arg-type]
            if mask_on(layer) is None:
                ctx.leave(name, f"sparsity={self.sparsity} takes none of an output's weights; it was trained")
            else:
                ctx.change(name, zeros(layer))
        ctx.change("*", f"trained for {self.epochs:g} epochs, last loss {loss:.4g}")
        return model


def _remove(layer: nn.Module, noise: Dropped) -> None:
    """Take the noise off a layer's weight; what else stands there stays."""
    links = links_of(layer)
    if len(links) == 1:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    else:
        del layer.parametrizations["weight"][links.index(noise)]  # type: ignore[index,union-attr]
