"""What all steps share that put other layers in place of linear layers, convolutions and tables."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.blocks import observed
from ..core.context import Context
from ..core.fit import Training
from ..core.step import Trait
from .matrices import Matrix, chosen_matrices
from .recalibrate import recalibrate
from .select import LayerStep

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class Made:
    """What stands in place of a layer, and how it came about."""

    module: nn.Module
    how: str


class Replacing(LayerStep):
    """A step that puts cheaper layers in place of chosen ones.

    With `recalibrate` the statistics of batch norms are then taken anew on the calibration data (needs no labels);
    with `retrain` the network is then trained.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    recalibrate: bool = True
    retrain: Training | None = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        return self.healed(self.changed(model, ctx), ctx)

    def changed(self, model: nn.Module, ctx: Context) -> nn.Module:
        """The model with other layers in place of the chosen ones, not trained."""
        found = self.chosen(model, ctx)
        for name, made in self.made(found, model, ctx):
            model = exchanged(model, name, made.module.to(ctx.device))
            ctx.change(name, made.how)
        if self.recalibrate and ctx.record.changed:
            recalibrate(model, ctx)
        return model

    def healed(self, model: nn.Module, ctx: Context) -> nn.Module:
        """The model after `retrain`, if that is set and anything changed."""
        if self.retrain is not None and ctx.record.changed:
            ctx.fit(model, self.retrain, text=f"retraining after {self.kind}")
        return model

    @abstractmethod
    def made(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterable[tuple[str, Made]]:
        """What stands in place of these layers, by name; those left alone are reported."""

    @abstractmethod
    def obstacle(self, matrix: Matrix) -> str:
        """Why this step has nothing for a layer; empty if it has."""

    def chosen(self, model: nn.Module, ctx: Context) -> dict[str, Matrix]:
        """The layers to replace; every other one that has parameters is reported as left alone."""
        found = {each.name: each for each in chosen_matrices(self, model, ctx, "nothing is put in its place")}
        running = called(model, list(found), ctx)
        left = {}
        for name, each in found.items():
            if each.twins:
                left[name] = "shares its weight with another layer, which this would end"
            elif each.keep is not None:
                left[name] = "is pruned, and what takes its place would have no zeros"
            elif name not in running:
                left[name] = "is not called: what surrounds it uses its weight as it is"
            elif reason := self.obstacle(each):
                left[name] = reason
        for name, reason in left.items():
            ctx.record.changed.pop(name, None)
            ctx.leave(name, reason)
        return {name: each for name, each in found.items() if name not in left}


def shown(parameters: int, whole: int, missed: float) -> str:
    """What a layer's weight became, for the record."""
    return f"{parameters:,} of {whole:,} parameters, {missed:.1%} of the energy missed"


def missed_energy(weight: Tensor, found: Tensor) -> float:
    """The share of the energy of a weight that an approximation misses."""
    return float((weight - found).double().square().sum() / weight.double().square().sum().clamp_min(1e-300))


def rounded(rank: int, multiple: int) -> int:
    """The largest multiple that is not above `rank`; below two of them `rank` itself."""
    return rank // multiple * multiple if rank >= 2 * multiple else rank


@torch.no_grad()
def filled(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """`module` with these values as its weight and bias, in their type."""
    assert isinstance(module.weight, Tensor)
    module.weight = nn.Parameter(weight.detach().reshape(module.weight.shape).contiguous().clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.detach().clone())
    return module


def pointwise(layer: Convolution, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
    """A convolution with a kernel of one of the kind of `layer`."""
    return type(layer)(inputs, outputs, 1, bias=bias)


def with_kernel(layer: Convolution, inputs: int, outputs: int) -> nn.Module:
    """A convolution with the kernel of `layer`, where and how it is applied, between other numbers of channels."""
    kind: Any = type(layer)
    where = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    made: nn.Module = kind(inputs, outputs, *where, bias=False, padding_mode=layer.padding_mode)
    return made


@torch.no_grad()
def called(model: nn.Module, names: list[str], ctx: Context) -> set[str]:
    """Those of these layers that run as modules when the model does."""
    found: set[str] = set()
    hooks = {name: (lambda _given, _output, name=name: found.add(name)) for name in names}
    observed(model.eval(), (), ctx.example, hooks)
    return found


def replaced(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """`model`, in place, with `module` under this name alone; `module` itself if the name is that of the model."""
    if not name:
        return module
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
    return model


def holders(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module of `model` that has this very module as a part, and by which name."""
    return [(each, name) for each in model.modules() for name, part in each._modules.items() if part is module]


def exchanged(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """`model`, in place, with `module` wherever the one under this name is: a model may hold one under several."""
    if not name:
        return module
    for holder, attribute in holders(model, model.get_submodule(name)):
        setattr(holder, attribute, module)
    return model
