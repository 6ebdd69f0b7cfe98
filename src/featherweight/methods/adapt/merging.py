"""An adapter merged into the weights beside which it was trained: exactly into floats, within a bound into integers."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.core.adapted import Adapted
from featherweight.core.context import Context
from featherweight.core.encoding import Affine
from featherweight.core.errors import RecipeError
from featherweight.core.outputs import first
from featherweight.core.soft import chains, encodings
from featherweight.model.adapters import merged_values, row_factor
from featherweight.model.feedback import rerounded
from featherweight.model.held import HeldIntegers
from featherweight.model.masks import links_of, plain_weight
from featherweight.model.matrices import sharers
from featherweight.model.moments import observe
from featherweight.model.replacing import exchanged
from featherweight.model.rounding import Rounding

from .training import AdapterStep

BESIDE = "(merge)"  # behind a layer's name in the record: its adapter stays beside it


class MergingStep(AdapterStep):
    """An adapter step whose result can be merged into the weights of its base.

    `merge` None merges where the base is plain floats, which changes no output, and keeps the adapter beside every
    other weight; False keeps it beside all, to be switched; True merges everywhere: weights stored as integers are
    rounded again on their grids with the adapter's calibration data, later columns making up for earlier ones. The
    outputs then differ from those before merging by at most `bound` (root mean square over that of the outputs).
    Raises `RecipeError` with the figure where they differ by more, or where a weight is stored in a form that cannot
    be rounded again.
    """

    merge: bool | None = None
    bound: Annotated[float, Field(gt=0)] = 0.05

    def merged(self, model: nn.Module, names: list[str], ctx: Context) -> nn.Module:
        """The model with the adapters on these layers merged as `merge` says."""
        if self.merge is False:
            return model
        soft = []
        for name in names:
            reason = obstacle(model, name)
            if not reason and not parametrize.is_parametrized(_base(model, name)):
                _merge_floats(model, name)
            elif self.merge is None:
                ctx.leave(f"{name} {BESIDE}", reason or "its base is stored as integers; the adapter stays beside it")
            elif reason:
                raise RecipeError(f"{self.kind}: the adapter on {name} cannot be merged: {reason}; set merge: false")
            else:
                soft.append(name)
        if soft:
            self._merge_integers(model, soft, ctx)
        return model

    @torch.no_grad()
    def _merge_integers(self, model: nn.Module, names: list[str], ctx: Context) -> None:
        """Round the weights again with their adapters in them; refuse if that moves the outputs too far."""
        wanted = outputs(model, ctx)
        moments = observe(model, names, ctx)
        for name in names:
            hessian = moments[name].mean()[0] if moments[name].hessian is not None else None
            merge_rounded(model, name, hessian)
        off = relative(outputs(model, ctx), wanted)
        if off > self.bound:
            raise RecipeError(
                f"{self.kind}: merged into the integers of {len(names)} layers the adapter's outputs move by {off:.3g} "
                f"(relative), more than bound={self.bound:g}; keep it beside them (merge: false) or raise the bound"
            )
        for name in names:
            how = f"merged into its integers, outputs moved by {off:.3g} in all (bound {self.bound:g})"
            ctx.change(name, f"{ctx.record.changed[name]}; {how}")


def obstacle(model: nn.Module, name: str) -> str:
    """Why the adapter on a layer cannot be merged into its weight; empty if it can."""
    layer = _base(model, name)
    sharing = sharers(model, layer)
    if sharing:
        return f"its base shares its weight with {sharing[0][0]}"
    if not parametrize.is_parametrized(layer):
        return ""
    stored, links = encodings(layer).get("weight"), links_of(layer)
    several = [attribute for _, _, attribute, _ in chains(layer)] != ["weight"]
    if several or len(links) != 1 or not isinstance(links[0], HeldIntegers | Rounding):
        return f"its base is stored as {stored.form if stored else 'a chain of several links'}"
    return ""


def _base(model: nn.Module, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    assert isinstance(module, Adapted) and isinstance(module.base, nn.Linear)
    return module.base


@torch.no_grad()
def _merge_floats(model: nn.Module, name: str) -> None:
    """Put the layer with its adapter in its weight in place of the two."""
    module, layer = model.get_submodule(name), _base(model, name)
    assert isinstance(module, Adapted)
    weight, bias = merged_values(module)
    layer.weight.copy_(weight)
    _put(model, name, layer, bias)


@torch.no_grad()
def merge_rounded(model: nn.Module, name: str, hessian: Tensor | None) -> None:
    """Put the layer with its adapter in its integers in place of the two; to nearest without a `hessian`."""
    module, layer = model.get_submodule(name), _base(model, name)
    assert isinstance(module, Adapted)
    stored = encodings(layer)["weight"]
    assert isinstance(stored, Affine)
    weight, bias = merged_values(module)
    found = rerounded(stored, weight.float(), hessian, row_factor(module))
    (_, _, _, (link,)) = next(chains(layer))
    assert isinstance(link, HeldIntegers | Rounding)
    link.scale.copy_(found.scale)
    if isinstance(link, HeldIntegers):
        link.values.copy_(found.values)
    else:
        plain_weight(layer).copy_(found.decode())
    _put(model, name, layer, bias)


def _put(model: nn.Module, name: str, layer: nn.Linear, bias: Tensor | None) -> None:
    if bias is not None and not (layer.bias is not None and torch.equal(bias, layer.bias)):
        layer.bias = nn.Parameter(bias.detach().clone(), layer.bias is None or layer.bias.requires_grad)
    exchanged(model, name, layer)


@torch.no_grad()
def outputs(model: nn.Module, ctx: Context) -> list[Tensor]:
    """The first output of `model` on each calibration batch, on the CPU."""
    model.to(ctx.device).eval()
    return [first(ctx.task.call(model, batch)).float().cpu() for batch in ctx.batches("calibrate")]


def relative(made: list[Tensor], wanted: list[Tensor]) -> float:
    """Root mean square of the difference over that of `wanted`."""
    difference = sum(float((one - other).double().square().sum()) for one, other in zip(made, wanted))
    return (difference / max(sum(float(each.double().square().sum()) for each in wanted), 1e-300)) ** 0.5
