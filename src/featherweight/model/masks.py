"""Masks on the weights of layers: where they stand, how they are put there, tightened and taken away."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from ..core.context import Context
from ..core.soft import Mask
from .select import Kinds, LayerStep

TYPES: Kinds = (nn.Linear, _ConvNd)


def links_of(layer: nn.Module) -> list[nn.Module]:
    """The links on a layer's weight, from first to last."""
    return list(layer.parametrizations["weight"]) if parametrize.is_parametrized(layer, "weight") else []  # type: ignore[index]


def plain_weight(layer: nn.Module) -> nn.Parameter:
    """The trained tensor behind a layer's weight: what the first link gets, or the weight itself."""
    soft = parametrize.is_parametrized(layer, "weight")
    return layer.parametrizations["weight"].original if soft else layer.weight  # type: ignore[index,union-attr,return-value]


def mask_on(layer: nn.Module) -> Mask | None:
    """The mask on a layer's weight, if there is one."""
    return next((link for link in links_of(layer) if isinstance(link, Mask)), None)


def put_mask(layer: nn.Module, keep: Tensor) -> Mask:
    """Hold a layer's weight at zero where `keep` is False: by the mask that is there, which is tightened, or by a new
    one. A mask that would hold nothing is not put.
    """
    mask = mask_on(layer)
    if mask is not None:
        mask.keep &= keep
        return mask
    mask = Mask(keep)
    if not bool(keep.all()):
        parametrize.register_parametrization(layer, "weight", mask)
    return mask


def drop_empty(layers: Iterable[nn.Module]) -> None:
    """Take masks away that hold back nothing: a model that is as before must not look changed."""
    for layer in layers:
        mask = mask_on(layer)
        if mask is not None and len(links_of(layer)) == 1 and bool(mask.keep.all()):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def zeros(layer: nn.Module) -> str:
    """The share of a layer's weights that its mask holds at zero, in words."""
    mask = mask_on(layer)
    count = plain_weight(layer).numel()
    share = 0.0 if mask is None else 1 - int(mask.keep.sum()) / count
    return f"{share:.1%} of {count} weights are zero"


def maskable(step: LayerStep, model: nn.Module, ctx: Context, types: Kinds = TYPES) -> dict[str, nn.Module]:
    """The chosen layers whose weight is plain or masked, by name; every other layer is reported as left alone."""
    for name, reason in uncovered(model, types):
        ctx.leave(name, reason)
    shared = shared_weights(model)
    found: dict[str, nn.Module] = {}
    for name, layer in step.layers(model, ctx, types):
        others = [type(link).__name__ for link in links_of(layer) if not isinstance(link, Mask)]
        if name in shared:
            ctx.leave(name, f"its weight is shared with {shared[name]}")
        elif others:
            ctx.leave(name, f"its weight is stored in another form already ({others[0]})")
        else:
            found[name] = layer
    return found


def uncovered(model: nn.Module, types: Kinds = TYPES) -> list[tuple[str, str]]:
    """Modules with matrices of their own that are of none of `types`, and why they are not masked."""
    found = []
    for name, module in model.named_modules():
        matrices = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
        if matrices and not isinstance(module, types) and "parametrizations" not in name.split("."):
            looked_up = isinstance(module, nn.Embedding)
            reason = "its rows are looked up, not multiplied" if looked_up else "not a layer that this works on"
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


def keep_largest(score: Tensor, count: int) -> Tensor:
    """A boolean mask of the shape of `score`: True for its `count` largest entries, of equal ones the first."""
    order = torch.sort(score.flatten(), descending=True, stable=True).indices
    keep = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    keep[order[:count]] = True
    return keep.reshape(score.shape)
