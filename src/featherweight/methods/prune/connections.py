"""The connections of layers: weights as matrices in the order in which patterns lie, and the masks that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from ...core.context import Context
from ...core.soft import Mask
from ...model.masks import TYPES, mask_on, maskable, plain_weight
from ...model.select import Kinds, LayerStep
from .patterns import Pattern

OBSERVED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # layers whose rows of inputs can be seen; `Conv1D` is one too


@dataclass(frozen=True)
class Connections:
    """The weight of one layer and the mask on it, seen as matrices [outputs, columns].

    The columns of a convolution lie input channel beside input channel, one place of the kernel after the other: a
    group of neighbours is what a sparse kernel takes together. `axis` of the weight counts outputs. `before` is what
    was not pruned yet when the step began.
    """

    name: str
    layer: nn.Module
    mask: Mask
    axis: int
    order: Tensor
    before: Tensor

    @property
    def weight(self) -> Tensor:
        """The weight as the layer sees it, float32."""
        return self.matrix(self.layer.weight.detach()).float()  # type: ignore[operator]

    @property
    def allowed(self) -> Tensor:
        """What is not pruned yet."""
        return self.matrix(self.mask.keep)

    @property
    def parameter(self) -> nn.Parameter:
        """The trained tensor behind the mask."""
        return plain_weight(self.layer)

    @property
    def zeros(self) -> float:
        """The share of weights that the mask holds at zero."""
        return 1 - int(self.mask.keep.sum()) / self.mask.keep.numel()

    def matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as a matrix."""
        return tensor.movedim(self.axis, 0).flatten(1)[:, self.order]

    def shaped(self, matrix: Tensor) -> Tensor:
        """A matrix in the weight's shape: what undoes `matrix`."""
        shape = self.mask.keep.shape
        moved = (shape[self.axis], *(size for dim, size in enumerate(shape) if dim != self.axis))
        return matrix[:, torch.argsort(self.order)].reshape(moved).movedim(0, self.axis)

    @torch.no_grad()
    def put(self, keep: Tensor, weight: Tensor | None = None) -> None:
        """Set the mask, and with `weight` the values under it, from matrices."""
        if weight is not None:
            self.parameter.copy_(self.shaped(weight))
        self.mask.keep.copy_(self.shaped(keep))

    @property
    def state(self) -> tuple[Tensor, Tensor]:
        """Copies of mask and values, as `put` takes them."""
        return self.allowed.clone(), self.matrix(self.parameter.detach()).clone()


def connections(step: LayerStep, model: nn.Module, ctx: Context, pattern: Pattern) -> dict[str, Connections]:
    """The chosen layers by name, each under a mask (a new one holds back nothing yet); others are reported as left."""
    found = {}
    for name, layer in maskable(step, model, ctx, kinds(model)).items():
        axis = 1 if isinstance(layer, _ConvTransposeNd) or _turned(layer) else 0
        weight = plain_weight(layer)
        if reason := pattern.obstacle(*_extents(layer, weight, axis)):
            ctx.leave(name, reason)
            continue
        mask = mask_on(layer)
        if mask is None:
            mask = Mask(torch.ones_like(weight, dtype=torch.bool))
            parametrize.register_parametrization(layer, "weight", mask)
        found[name] = Connections(name, layer, mask, axis, _order(weight, axis), mask.keep.clone())
    return found


def kinds(model: nn.Module) -> Kinds:
    """The types of layers that are worked on; those of transformers' `Conv1D` where the model holds some."""
    return (*TYPES, *{type(module) for module in model.modules() if _turned(module)})


def _turned(module: nn.Module) -> bool:
    """Whether this is transformers' linear layer with a transposed weight."""
    return parametrize.type_before_parametrizations(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _extents(layer: nn.Module, weight: Tensor, axis: int) -> tuple[int, int, int]:
    """Outputs and inputs that meet in a layer (those of one of its groups of channels), and places of its kernel."""
    groups = int(getattr(layer, "groups", 1))
    outputs, inputs = weight.shape[axis], weight.shape[1 - axis]
    places = weight.numel() // (outputs * inputs)
    return (outputs, inputs // groups, places) if axis else (outputs // groups, inputs, places)


def _order(weight: Tensor, axis: int) -> Tensor:
    """The places of columns that bring the input channels of each place of a kernel side by side."""
    columns = weight.numel() // weight.shape[axis]
    inputs = weight.shape[1 - axis]
    return torch.arange(columns, device=weight.device).reshape(inputs, -1).t().flatten()


def observable(layer: nn.Module) -> bool:
    """Whether the inputs that the rows of a layer's weight are multiplied with can be seen."""
    return isinstance(layer, OBSERVED) or (not isinstance(layer, _ConvNd) and _turned(layer))
