"""sparse.structured_dropout: hidden units are left out batch by batch, and what is left out is not computed."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.core.context import Context
from featherweight.core.fit import Training
from featherweight.core.step import Trait
from featherweight.model.groups import Coupling, Group, couple
from featherweight.model.masks import TYPES
from featherweight.model.select import LayerStep, excluded, unused

from .subset import CONVOLUTIONS, Units, cuts, in_part


class StructuredDropout(LayerStep, Training, kind="sparse.structured_dropout"):
    """Train with a random part of the hidden units, drawn for each batch, so that its matrices are smaller.

    Hidden units are the outputs of one linear layer or convolution that only go, through what acts on each by itself
    and through batch norms, into the inputs of others: the inner layer of a feed-forward network or of a residual
    block. Which these are is read off the exported graph. For each batch a share of `rate` of each such layer's units
    is left out: rows of one matrix and columns of the other are selected before they are multiplied, and what comes in
    is scaled up so that sums are as expected. Afterwards the network is whole. Raises `TaskError` if the model cannot
    be exported or there are no training data, `NotFinite` if the loss leaves the finite numbers.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE | Trait.TRAINABLE
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "https://jmlr.org/papers/v15/srivastava14a.html"

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        for glob in unused(model, TYPES, self.only, self.skip):
            ctx.warn(f"{self.kind}: no layer matches {glob!r}")
        groups, reasons = self._groups(model, ctx)
        layers = cuts(groups)
        for name, module in model.named_modules():
            if isinstance(module, TYPES) and (name not in layers or excluded(name, self.only, self.skip)):
                ctx.leave(name, reasons.get(name, "its units go elsewhere than into the inputs of other layers"))
        if not groups:
            return model
        generator = ctx.generator(f"{self.kind}: units")

        def draw(_model: nn.Module, t: float) -> None:
            for units in groups:
                units.draw(generator)

        with in_part(model, layers):
            loss = ctx.fit(model, self, during=draw, text=self.kind)
        for units in groups:
            for name in units.outputs:
                ctx.change(name, f"{units.keep} of {units.count} units in each batch")
            for name in units.inputs:
                ctx.change(name, f"the inputs from {units.keep} of {units.count} units in each batch")
        ctx.change("*", f"trained for {self.epochs:g} epochs, last loss {loss:.4g}")
        return model

    def _groups(self, model: nn.Module, ctx: Context) -> tuple[list[Units], dict[str, str]]:
        """The groups of hidden units, and for layers that have none the reason."""
        coupling = couple(model, ctx.example)
        modules, found = dict(model.named_modules()), []
        reasons = {name.rpartition(".")[0]: why for (name, dim), why in coupling.fixed.items() if dim == 0}
        for place, group in enumerate(coupling.groups):
            if reason := self._obstacle(coupling, place, modules):
                reasons |= {name.rpartition(".")[0]: reason for name, dim in group.places if dim == 0}
            else:
                found.append(self._units(group))
        for name, module in modules.items():
            if isinstance(module, TYPES) and (why := excluded(name, self.only, self.skip)):
                reasons[name] = why
        return found, reasons

    def _units(self, group: Group) -> Units:
        positions = {place: torch.as_tensor(where) for place, where in group.places.items()}
        return Units(
            group.name,
            len(group),
            max(1, round((1 - self.rate) * len(group))),
            {name.rpartition(".")[0]: where for (name, dim), where in positions.items() if dim == 0},
            {name.rpartition(".")[0]: where for (name, dim), where in positions.items() if dim == 1},
        )

    def _obstacle(self, coupling: Coupling, place: int, modules: dict[str, nn.Module]) -> str:
        """Why a group of coupled units is not that of one hidden layer; empty if it is."""
        group = coupling.groups[place]
        if place in coupling.refused:
            return coupling.refused[place]
        if place in coupling.repair:
            return "sizes that modules hold would have to follow its units"
        uses = Counter(coupling.names.values())
        if tied := [name for name, _ in group.places if uses[name] > 1]:
            return f"{tied[0]} is shared with another layer"
        for name, _ in group.places:
            if why := _unfit(modules[name.rpartition(".")[0]]):
                return f"{name.rpartition('.')[0]} {why}"
        matrices = [(name, dim) for name, dim in group.places if len(coupling.shapes[name]) > 1]
        makers = [name.rpartition(".")[0] for name, dim in matrices if dim == 0]
        if len(makers) != 1:
            return "its units are those of several layers at once"
        if not any(dim == 1 for _, dim in matrices):
            return "no layer takes its units in"
        return excluded(makers[0], self.only, self.skip) or ""


def _unfit(module: nn.Module) -> str:
    """Why a layer cannot compute with a part of its units; empty if it can."""
    if isinstance(module, _BatchNorm):
        whole = module.track_running_stats and module.momentum is not None
        return "" if whole else "keeps no running average of its statistics"
    if isinstance(module, CONVOLUTIONS):
        return "" if module.groups == 1 else "is a grouped convolution"
    return "" if type(module) is nn.Linear else f"is a {type(module).__name__}"
