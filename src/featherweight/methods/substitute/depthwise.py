"""substitute.separable: a depthwise and a pointwise convolution in place of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.context import Context
from ...core.step import OneOf, Place
from ...model.blocks import input_shapes
from ...model.factored import Factored
from ...model.matrices import Matrix
from ...model.moments import observe
from ...model.replacing import Made, Replacing, filled, pointwise, replaced
from .separable import fitted, output_error, product

KINDS = (nn.Conv1d, nn.Conv2d)
UNKNOWNS = 6000  # of the largest system that is solved; above it the depthwise part stays as it began
SHORTER = 0.995  # of the model's time: less than half a per cent is not told from noise


class SeparableConvolutions(Replacing, kind="substitute.separable"):
    """Put a depthwise and a pointwise convolution in place of each convolution with a kernel.

    Both are fitted to the layer's own inputs and outputs on the calibration data by alternating least squares, from the
    singular vectors of its weight. Each input channel has `multiplier` depthwise kernels. With `of` "latency" a layer
    is replaced only if the model with it replaced alone is faster on the target (layers that look alike and get inputs
    of one shape are measured once), with "macs" if it computes less. With `retrain` the network is then trained, which
    it seldom goes without: a teacher (`retrain: {teacher: 0.5}`) helps. Raises `TaskError` if there is no target for
    "latency".
    """

    place: ClassVar[Place | None] = None  # on request: without much training it costs most networks too much
    paper: ClassVar[str] = "arXiv:1704.04861, arXiv:1808.05517"

    multiplier: Annotated[int, Field(ge=1, le=8), OneOf(1, 2)] = 1
    of: Literal["macs", "latency"] = "macs"

    def obstacle(self, matrix: Matrix) -> str:
        layer = matrix.layer
        if not isinstance(layer, KINDS) or (places := matrix.parameter()[0, 0].numel()) < 2:
            return "is no one- or two-dimensional convolution with a kernel above one"
        if layer.groups > 1:
            return "has groups of channels already"
        outputs, inputs = matrix.parameter().shape[:2]
        if inputs * self.multiplier * (places + outputs) >= outputs * inputs * places:
            return f"computes no more than a depthwise and a pointwise one with multiplier={self.multiplier}"
        return ""

    def made(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterator[tuple[str, Made]]:
        for name in self._paying(found, model, ctx):
            moment = observe(model, [name], ctx)[name].mean()[0]
            weight = found[name].weight().reshape(*found[name].parameter().shape[:2], -1)
            inputs, places = weight.shape[1:]
            sweeps = 5 if inputs * self.multiplier * places <= UNKNOWNS else 0
            depth, point = fitted(weight, moment, self.multiplier, sweeps)
            missed = output_error(weight, product(depth, point), moment)
            spent = depth.numel() + point.numel()
            how = f"{spent:,} of {weight.numel():,} parameters, {missed:.1%} of the energy of its outputs missed"
            yield name, Made(_layers(found[name].layer, depth, point), how)

    def _paying(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> list[str]:
        """The layers whose replacement makes the model faster; the others are reported."""
        if self.of == "macs" or not found:
            return list(found)
        shapes = input_shapes(model, found, ctx.example)
        looks = {name: f"{each.layer!r} {shapes[name]}" for name, each in found.items()}
        firsts = {look: name for name, look in reversed(looks.items())}
        whole, *rest = ctx.seconds([model, *(self._with_one(model, found, name) for name in firsts.values())])
        ratio = {look: seconds / whole for look, seconds in zip(firsts, rest)}
        paying = []
        for name, look in looks.items():
            if ratio[look] < SHORTER:
                paying.append(name)
            else:
                ctx.leave(name, f"the model takes {ratio[look]:.3f} of its time with this layer replaced: no gain")
        return paying

    def _with_one(self, model: nn.Module, found: dict[str, Matrix], name: str) -> nn.Module:
        """A copy of `model` with one layer replaced, its weights of no account."""
        shape = found[name].parameter().shape
        depth = torch.zeros(shape[1], self.multiplier, shape[2:].numel())
        made = _layers(found[name].layer, depth, torch.zeros(shape[0], shape[1], self.multiplier))
        return replaced(copy.deepcopy(model), name, made)


def _layers(layer: nn.Module, depth: Tensor, point: Tensor) -> Factored:
    """The two layers with these weights [inputs, multiplier, places] and [outputs, inputs, multiplier]."""
    assert isinstance(layer, KINDS)
    inputs, multiplier = depth.shape[:2]
    kind: Any = type(layer)
    where = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    first = kind(inputs, inputs * multiplier, *where, groups=inputs, bias=False, padding_mode=layer.padding_mode)
    last = pointwise(layer, inputs * multiplier, len(point), layer.bias is not None)
    dtype = layer.weight.dtype
    return Factored(filled(first, depth.to(dtype)), filled(last, point.to(dtype), layer.bias))
