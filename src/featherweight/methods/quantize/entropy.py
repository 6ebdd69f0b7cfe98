"""quantize.entropy: training under a price for every bit that an entropy coder will take for the weights."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from featherweight.core.context import Context
from featherweight.core.encoding import Sparse
from featherweight.core.errors import TaskError
from featherweight.core.fit import Groups, Training, training_inputs
from featherweight.core.soft import encodings
from featherweight.core.step import Between, Place, Trait
from featherweight.model.learned import LEAST, LearnedRounding
from featherweight.model.masks import shared_weights
from featherweight.model.select import LayerStep

from .description import expected, price, total
from .floats import leave_floats, round_floats

TYPES = (nn.Linear, _ConvNd)
REFRESH = 10  # batches after which the prices of a layer's weights are taken anew
STEP_RATE = 0.1  # of the learning rate, for step sizes (arXiv:1902.08153)


class EntropyQuantization(LayerStep, Training, kind="quantize.entropy"):
    """Train the weights on grids of integers while every bit that an entropy coder takes for them has a price.

    The loss is `task's loss + rate * ln 2 * bits / training inputs`, with `rate` 1 the shortest description of labels
    and weights together, where the loss is a cross-entropy. Bits are those of an adaptive code that knows the mean
    magnitudes of rows and columns (see `description`), so that weights, rows and columns that say little become 0. The
    price rises from 0 over the first share `ramp` of the training. Each layer has one step size, first `coarse` times
    the root mean square of its weights, and trained with them. Weights that are pruned stay 0. All other floats
    (statistics of batch norms too) of modules that `only` and `skip` do not leave out are then rounded to about
    `digits` binary digits. Made for the target `coded`; any target that takes int8 carries it.
    Raises `TaskError` without training data, `NotFinite` if the loss leaves the finite numbers.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.TRAINABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"int8"})
    place: ClassVar[Place | None] = None  # it pays behind an entropy coder alone, which most targets have not
    gains: ClassVar[frozenset[str]] = frozenset({"size"})
    paper: ClassVar[str] = "arXiv:1906.06624, arXiv:1902.08153"
    trains: ClassVar[bool] = True

    epochs: Annotated[float, Field(gt=0), Between(2, 40, log=True)] = 10.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    rate: Annotated[float, Field(gt=0), Between(0.01, 1.0, log=True)] = 0.1
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.3
    coarse: Annotated[float, Field(gt=0, le=8)] = 1.0
    digits: Annotated[int, Field(ge=2, le=24)] = 5

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        if not ctx.task.has("train"):
            raise TaskError(f"task {ctx.task.name} has no 'train' data, which {self.kind} needs")
        grids = [Grid(name, layer, self.coarse) for name, layer in self._choose(model, ctx)]
        if not grids:
            return model
        priced = Priced(grids, self.rate * math.log(2) / training_inputs(ctx), self.ramp)
        base = self.term()

        def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
            return base(model, batch, output, ctx) + priced()

        ctx.fit(
            model, self, term, during=priced.rise, text="training under a price for bits", groups=self._groups(grids)
        )
        for grid in grids:
            ctx.change(grid.name, grid.settle())
        leave_floats(self, model, TYPES, ctx)
        round_floats(self, model, self.digits)
        return model

    def _choose(self, model: nn.Module, ctx: Context) -> list[tuple[str, nn.Module]]:
        stored, sharing, found = encodings(model), shared_weights(model), []
        for name, layer in self.layers(model, ctx, TYPES):
            encoding = stored.get(f"{name}.weight")
            if encoding is not None and not isinstance(encoding, Sparse):
                ctx.leave(name, f"its weight is already stored as {encoding.form}")
            elif name in sharing:
                ctx.leave(name, f"its weight is shared with {sharing[name]}; its floats are only rounded")
            else:
                found.append((name, layer))
        return found

    def _groups(self, grids: list[Grid]) -> Groups:
        return [{"params": [grid.link.scale for grid in grids], "lr": STEP_RATE * self.lr, "weight_decay": 0.0}]


class Grid:
    """One layer's weight on a grid whose step is learned, and what one more in magnitude costs at each place."""

    def __init__(self, name: str, layer: nn.Module, coarse: float):
        self.name, self.layer = name, layer
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        size = weight[weight != 0].square().mean().sqrt() if bool(weight.any()) else weight.new_ones(())
        self.link = LearnedRounding(coarse * size).to(weight.device)
        parametrize.register_parametrization(layer, "weight", self.link)
        self.prices, self.factor = weight.new_zeros(()), 1 / math.sqrt(weight.numel() * self.link.high)

    @property
    def chain(self) -> Any:
        return self.layer.parametrizations["weight"]  # type: ignore[index]

    def value(self) -> Tensor:
        """The weight before it is rounded."""
        weight: Tensor = self.chain.original
        for link in list(self.chain)[:-1]:
            weight = link(weight)
        return weight

    def integers(self) -> Tensor:
        encoding = self.link.encode(self.value().detach())
        return encoding.values

    @torch.no_grad()
    def appraise(self) -> None:
        """Take the prices anew from the integers as they are."""
        magnitudes = self.integers().flatten(1).abs().float()
        self.prices = price(expected(magnitudes)).reshape(self.integers().shape)

    def bits(self) -> Tensor:
        """What changes of the code's length as weights and step change, in bits; prices are held."""
        scale = self.link.scale.clamp_min(LEAST)
        scale = scale.detach() + self.factor * (scale - scale.detach())  # moves as slowly as by the task's loss
        return (self.value().abs() * self.prices).sum() / scale

    @torch.no_grad()
    def settle(self) -> str:
        """Put a grid with the learned step in place of the one that learns; what was made of the layer."""
        integers, original = self.integers(), self.chain.original
        self.chain[-1] = self.link.settled()
        again = self.chain[-1].encode(self.value()).values
        exact = integers.float() * self.chain[-1].scale
        original.copy_(torch.where(again == integers, original, exact))
        zeros, count = int((integers == 0).sum()), integers.numel()
        return f"int8 near {total(integers.flatten(1)) / count:.3g} bits per weight, {zeros / count:.1%} zeros"


class Priced:
    """The term of the loss that stands for bits: `weight` times the bits of all grids, rising over a share `ramp`."""

    def __init__(self, grids: list[Grid], weight: float, ramp: float):
        self.grids, self.weight, self.ramp, self.share, self.calls = grids, weight, ramp, 0.0, 0

    def rise(self, _model: nn.Module, t: float) -> None:
        self.share = min(1.0, t / self.ramp) if self.ramp else 1.0

    def __call__(self) -> Tensor:
        if self.calls % REFRESH == 0:
            for grid in self.grids:
                grid.appraise()
        self.calls += 1
        return self.weight * self.share * torch.stack([grid.bits() for grid in self.grids]).sum()
