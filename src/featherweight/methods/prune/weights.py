"""Magnitude pruning: single connections are set to zero and held there."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ...core.context import Context
from ...core.fit import Training
from ...core.soft import Link, Mask
from ...core.step import Between, OneOf, Place, Trait
from ...model.select import LayerStep
from .scores import cubic, keep_largest_of_all

TYPES = (nn.Linear, _ConvNd)
RAMP = 0.7  # share of the training during which the sparsity rises; the rest heals
UPDATES = 100  # how often masks change on the way
Masks = dict[str, tuple[nn.Module, Mask]]


class WeightPruning(LayerStep, kind="prune.weights"):
    """Set the weights of smallest magnitude of linear layers and convolutions to zero and hold them there.

    `sparsity` is the share of zeros among the weights of the chosen layers: over all of them together (`scope`
    "global", where each layer keeps at least `min_keep` of its weights) or in each. With `retrain` the network is
    trained under the masks; with `gradual` as well the sparsity rises during the first 70% of that training on a
    cubic curve (arXiv:1710.01878). Weights that are zero already stay so: a second pass tightens the masks of the
    first. Biases, embeddings and shared weights are left alone.
    """

    takes = Trait.RESHAPABLE
    paper = "arXiv:1506.02626, arXiv:1710.01878"
    place = Place.SPARSIFY

    sparsity: Annotated[float, Field(gt=0, lt=1), Between(0.1, 0.95)] = 0.5
    scope: Annotated[Literal["global", "layer"], OneOf("global", "layer")] = "global"
    min_keep: Annotated[float, Field(ge=0, le=1)] = 0.02
    gradual: bool = True
    retrain: Training | None = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        masks = self._masks(model, ctx)
        open_ = {
            name: pair for part in self._parts(masks) if zeros(part) < self.sparsity for name, pair in part.items()
        }
        for name in masks.keys() - open_.keys():
            share = zeros({name: masks[name]} if self.scope == "layer" else masks)
            ctx.leave(name, f"{share:.1%} of the weights are zero already, sparsity={self.sparsity} asks for no more")
        if open_:
            before = {name: int(mask.keep.sum()) for name, (_, mask) in open_.items()}
            if self.retrain is not None and self.gradual:
                self._rise(model, ctx, open_, min(zeros(part) for part in self._parts(open_)))
            else:
                self._tighten(open_, self.sparsity)
                if self.retrain is not None and any(int(open_[name][1].keep.sum()) < before[name] for name in open_):
                    ctx.fit(model, self.retrain, text=f"retraining after {self.kind}")
            self._report(open_, before, ctx)
        drop_empty(masks)
        return model

    def _parts(self, masks: Masks) -> list[Masks]:
        """The masks that share one sparsity: all, or each by itself."""
        return [masks] if self.scope == "global" else [{name: pair} for name, pair in masks.items()]

    def _report(self, masks: Masks, before: dict[str, int], ctx: Context) -> None:
        for name, (_, mask) in masks.items():
            if int(mask.keep.sum()) < before[name]:
                ctx.change(name, f"{1 - float(mask.keep.float().mean()):.1%} of {mask.keep.numel()} weights are zero")
            else:
                ctx.leave(name, f"all of its {before[name]} weights are larger than those that had to go")

    def _masks(self, model: nn.Module, ctx: Context) -> Masks:
        """The mask of every chosen layer, put there where there is none yet."""
        for name, reason in uncovered(model):
            ctx.leave(name, reason)
        shared = shared_weights(model)
        found: Masks = {}
        for name, layer in self.layers(model, ctx, TYPES):
            if name in shared:
                ctx.leave(name, f"its weight is shared with {shared[name]}")
                continue
            links = links_of(layer)
            masks = [link for link in links if isinstance(link, Mask)]
            if links and not masks:
                ctx.leave(name, f"its weight is stored in another form already ({type(links[0]).__name__})")
                continue
            found[name] = (layer, masks[0] if masks else new_mask(layer))
        return found

    def _rise(self, model: nn.Module, ctx: Context, masks: Masks, start: float) -> None:
        assert self.retrain is not None
        done = -1

        def during(_model: nn.Module, t: float) -> None:
            nonlocal done
            if int(t * UPDATES) > done:
                done = int(t * UPDATES)
                self._tighten(masks, cubic(self.sparsity, t / RAMP, start))

        ctx.fit(model, self.retrain, during=during, text=f"{self.kind} at rising sparsity")
        self._tighten(masks, self.sparsity)

    @torch.no_grad()
    def _tighten(self, masks: Masks, sparsity: float) -> None:
        """Set the masks to exactly this sparsity; where `scope` is "layer" in each layer."""
        for part in self._parts(masks):
            scores = [layer.weight.detach().abs() for layer, _ in part.values()]  # type: ignore[operator]
            for (_, mask), keep in zip(part.values(), keep_largest_of_all(scores, 1 - sparsity, self.min_keep)):
                mask.keep.copy_(keep & mask.keep)


def links_of(layer: nn.Module) -> list[Link | nn.Module]:
    """The links on a layer's weight, from first to last."""
    return list(layer.parametrizations["weight"]) if parametrize.is_parametrized(layer, "weight") else []  # type: ignore[index]


def new_mask(layer: nn.Module) -> Mask:
    """A mask on a layer's weight that holds back nothing yet."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    mask = Mask(torch.ones_like(weight, dtype=torch.bool))
    parametrize.register_parametrization(layer, "weight", mask)
    return mask


def drop_empty(masks: Masks) -> None:
    """Take masks away that hold back nothing: a model that is as before must not look changed."""
    for layer, mask in masks.values():
        if len(links_of(layer)) == 1 and bool(mask.keep.all()):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def zeros(masks: Masks) -> float:
    """The share of weights that the masks hold at zero."""
    total = sum(mask.keep.numel() for _, mask in masks.values())
    return 1 - sum(int(mask.keep.sum()) for _, mask in masks.values()) / total if total else 0.0


def uncovered(model: nn.Module) -> list[tuple[str, str]]:
    """Modules with matrices of their own that this method does not work on, and why."""
    found = []
    for name, module in model.named_modules():
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False)) and not isinstance(module, TYPES):
            reason = (
                "its rows are looked up, not multiplied"
                if isinstance(module, nn.Embedding)
                else "not a linear layer or a convolution"
            )
            if not isinstance(module, parametrize.ParametrizationList):
                found.append((name or type(module).__name__, f"{type(module).__name__}: {reason}"))
    return found


def shared_weights(model: nn.Module) -> dict[str, str]:
    """Layers whose weight another module uses too, and the name of that one."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() > 1:
                holders.setdefault(id(parameter), []).append(name)
    return {
        name: next(other for other in names if other != name)
        for names in holders.values()
        if len(names) > 1
        for name in names
    }
