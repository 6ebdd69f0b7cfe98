"""Training at a fixed sparsity: what RigL, SET and static random sparsity share."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.core.context import Context
from featherweight.core.fit import Training
from featherweight.core.soft import Mask
from featherweight.core.step import Between, Trait
from featherweight.model.masks import drop_empty, keep_largest, mask_on, maskable, plain_weight, put_mask, zeros
from featherweight.model.select import LayerStep

from .allocation import counts, erdos_renyi_kernel, uniform
from .evolution import Evolution
from .exchange import random_mask
from .scratch import start_anew


class SparseTraining(LayerStep, Training):
    """Train with a fixed number of connections in each layer, and exchange some of them on the way.

    `sparsity` is the share of zeros over all chosen layers, spread by the Erdos-Renyi-kernel rule ("erk") or the same
    in each ("uniform"; the first layer is then best left out with `skip`). `start` "scratch" draws all weights anew and
    the connections at random; "given" goes on from the weights as they are and keeps the largest. Every `interval`
    optimizer steps, until the share `stop` of the training, the share `fraction` of each layer's connections (falling
    on a cosine) is dropped by magnitude and as many are grown.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.TRAINABLE
    takes: ClassVar[Trait] = Trait.RESHAPABLE
    trains: ClassVar[bool] = True
    random: ClassVar[bool] = False  # whether connections grow by chance

    sparsity: Annotated[float, Field(gt=0, lt=1), Between(0.5, 0.98)] = 0.9
    allocation: Literal["erk", "uniform"] = "erk"
    start: Literal["given", "scratch"] = "given"
    fraction: Annotated[float, Field(ge=0, le=1)] = 0.3
    interval: Annotated[int, Field(gt=0)] = 100
    stop: Annotated[float, Field(gt=0, le=1)] = 0.75

    @classmethod
    def sample(cls) -> dict[str, Any]:
        """Settings with which it shows what it does on a small task."""
        return {"interval": 1, "epochs": 2}

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        chosen = maskable(self, model, ctx)
        if not chosen:
            return model
        if self.start == "scratch":
            for name in start_anew(model):
                ctx.warn(f"{self.kind}: {name} is not drawn anew, its module has no reset_parameters")
        masks = self._masks(chosen, ctx)
        evolution = self._evolution(chosen, masks, ctx)
        handles = evolution.watch()
        try:
            loss = ctx.fit(model, self, during=evolution.during, after=evolution.after, text=self.kind)
        finally:
            for handle in handles:
                handle.remove()
        if self.fraction and not evolution.exchanged:
            ctx.warn(
                f"{self.kind}: nothing was exchanged in {evolution.steps} steps with interval={self.interval}; lower it"
            )
        drop_empty(chosen.values())
        for name, layer in chosen.items():
            self._report(name, layer, evolution.exchanged.get(name, 0), ctx)
        ctx.change("*", f"trained for {self.epochs:g} epochs from {self.start} weights, last loss {loss:.4g}")
        return model

    def _evolution(self, chosen: dict[str, nn.Module], masks: dict[str, Mask], ctx: Context) -> Evolution:
        return Evolution(
            {name: (layer, masks[name]) for name, layer in chosen.items()},
            self.fraction,
            self.interval,
            self.stop,
            ctx.generator(f"{self.kind}: growth") if self.random else None,
        )

    @torch.no_grad()
    def _masks(self, chosen: dict[str, nn.Module], ctx: Context) -> dict[str, Mask]:
        """A mask on every chosen layer that keeps as many of its weights as the allocation says."""
        shapes = [tuple(plain_weight(layer).shape) for layer in chosen.values()]
        spread = erdos_renyi_kernel if self.allocation == "erk" else uniform
        generator = ctx.generator(f"{self.kind}: connections")
        found: dict[str, Mask] = {}
        for (name, layer), count in zip(chosen.items(), counts(shapes, spread(shapes, 1 - self.sparsity))):
            weight: Tensor = layer.weight.detach()  # type: ignore[operator]
            scratch = self.start == "scratch"
            keep = random_mask(tuple(weight.shape), count, generator) if scratch else keep_largest(weight.abs(), count)
            found[name] = _set(layer, keep.to(weight.device))
        return found

    def _report(self, name: str, layer: nn.Module, exchanged: int, ctx: Context) -> None:
        if mask_on(layer) is None:
            ctx.leave(name, f"{self.allocation} allocation leaves it dense; it was trained")
        else:
            ctx.change(name, f"{zeros(layer)}, {exchanged} connections exchanged")


def _set(layer: nn.Module, keep: Tensor) -> Mask:
    """Put exactly this mask on a layer, whatever was held before, and let what it holds be zero behind it too."""
    weight = plain_weight(layer)
    mask = mask_on(layer)
    if mask is None:
        mask = put_mask(layer, torch.zeros_like(keep))
    else:
        weight.mul_(mask.keep)
    mask.keep.copy_(keep)
    plain_weight(layer).mul_(keep)
    return mask
