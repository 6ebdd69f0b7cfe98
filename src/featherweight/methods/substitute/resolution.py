"""substitute.resolution: images at a fraction of their height and width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, ClassVar

import torch
import torch.utils._pytree as pytree
from pydantic import Field
from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import RecipeError, TaskError
from ...core.fit import Training
from ...core.step import Between, Place, Step
from ...model.cost import forward_macs
from ...model.prompts import inputs_of
from ...model.recalibrate import recalibrate
from ...model.resized import Resized, scaled

Shapes = list[tuple[int, ...]]


class LowerResolution(Step, kind="substitute.resolution"):
    """Let the network compute on its images at a fraction of their height and width.

    The model takes images (N x C x H x W floats) at the size that they have and resizes them by `factor` before its
    first layer, bilinear and without antialiasing, so that convolutions compute about `factor` squared times as much;
    its weights stay as they are, under names that begin with "base". Batch norms are then recalibrated, and with
    `retrain` the network is trained at its new resolution, with the original at its own as a teacher if asked for.
    Raises `TaskError` for a model without images, one that has a layer tied to their size (a linear layer behind
    flattened maps), which is named, and one whose outputs grow with them.
    """

    place: ClassVar[Place | None] = None  # on request: without training small images cost most networks too much
    gains: ClassVar[frozenset[str]] = frozenset({"latency", "energy"})
    paper: ClassVar[str] = "arXiv:1704.04861"

    factor: Annotated[float, Field(gt=0, lt=1), Between(0.5, 0.9)] = 0.75
    recalibrate: bool = True
    retrain: Training | None = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        example, before = ctx.example, forward_macs(model.eval(), ctx.example)
        images = {name: each for name, each in example.items() if each.dim() == 4 and each.is_floating_point()}
        base, whole = (model.base, model.factor) if isinstance(model, Resized) else (model, 1.0)
        self._check_sizes(images, whole, ctx)
        made = Resized(whole * self.factor, list(images), inputs_of(base, example))
        wanted = _shapes(model, example)
        made.base = base
        self._try(made.eval(), example, wanted)
        if self.recalibrate:
            recalibrate(made, ctx)
        share = forward_macs(made, example) / before
        sides = "; ".join(f"{_sides(each, whole)} to {_sides(each, made.factor)}" for each in images.values())
        ctx.change("*", f"images of {sides}, {share:.1%} of the multiply-accumulates")
        if self.retrain is not None:
            ctx.fit(made, self.retrain, text=f"retraining after {self.kind}")
        return made

    def _check_sizes(self, images: Mapping[str, Tensor], whole: float, ctx: Context) -> None:
        """Raise an error that says what to do where there are no images, or none that get smaller."""
        if not images:
            given = ", ".join(f"{name}: {each.dtype} {tuple(each.shape)}" for name, each in ctx.example.items())
            raise TaskError(f"{self.kind} needs an input of images (N x C x H x W floats); this model takes {given}")
        for each in images.values():
            now, then = _sides(each, whole), _sides(each, whole * self.factor)
            if now == then or min(scaled(side, whole * self.factor) for side in each.shape[2:]) < 1:
                what = f"images of {now} become images of {then}"
                raise RecipeError(f"{self.kind}: with factor={self.factor:g} {what}; give another factor")

    @torch.no_grad()
    def _try(self, made: Resized, example: Mapping[str, Tensor], wanted: Shapes) -> None:
        """Raise `TaskError` where the model cannot take smaller images, or gives outputs of other shapes for them."""
        with _running(made) as names:
            try:
                found = _shapes(made, example)
            except Exception as error:  # the user's own code runs here
                reason, where = " ".join(str(error).split())[:160], names[-1].removeprefix("base").removeprefix(".")
                layer = f"the layer {where!r}" if where else "the model itself"
                raise TaskError(
                    f"{self.kind}: {layer} is tied to the size of the images ({reason}); a network that pools over all "
                    "positions before its last layers (nn.AdaptiveAvgPool2d(1)) takes any size"
                ) from error
        for one, other in zip(wanted, found, strict=True):
            if one != other:
                raise TaskError(
                    f"{self.kind}: an output of {_times(one)} becomes {_times(other)} with smaller images; "
                    "only networks whose outputs do not grow with their images can take them"
                )


@contextmanager
def _running(model: nn.Module) -> Iterator[list[str]]:
    """Within this block: the names of the modules that run, from the outermost to the innermost."""
    names: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda _module, _given, name=name: names.append(name)))
        hooks.append(module.register_forward_hook(lambda _module, _given, _output: _left(names)))
    try:
        yield names
    finally:
        for hook in hooks:
            hook.remove()


def _left(names: list[str]) -> None:
    names.pop()  # a hook that gave the name would put it in place of the output


@torch.no_grad()
def _shapes(model: nn.Module, example: Mapping[str, Tensor]) -> Shapes:
    leaves = pytree.tree_leaves(model(**example))
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]


def _sides(images: Tensor, factor: float) -> str:
    return _times([scaled(side, factor) for side in images.shape[2:]])


def _times(shape: tuple[int, ...] | list[int]) -> str:
    return " x ".join(map(str, shape))
