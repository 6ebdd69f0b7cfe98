"""factor.tucker: three thin convolutions in place of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from ...core.context import Context
from ...model.factored import Factored
from ...model.matrices import Matrix
from ...model.replacing import Convolution, Made, filled, missed_energy, pointwise, rounded, shown, with_kernel
from .factoring import Factoring
from .networks import Tucker, tucker


class TuckerFactors(Factoring, kind="factor.tucker"):
    """Put three layers in place of each convolution: fewer inputs, the kernel between few channels, more outputs again.

    The weight's first two modes are decomposed (Tucker-2); both ranks are the same share of the channels, the largest
    that `keep` allows each layer, in multiples of `multiple` (default: what the target likes). Stride, padding and
    dilation stay with the kernel. With `retrain` the network is then trained.
    """

    paper: ClassVar[str] = "arXiv:1511.06530"

    multiple: Annotated[int, Field(ge=1)] | None = None

    def obstacle(self, matrix: Matrix) -> str:
        if reason := no_kernel(matrix):
            return reason
        outputs, inputs, places = sizes(matrix)
        if self._parameters(1, 1, outputs, inputs, places) >= outputs * inputs * places:
            return f"no ranks have fewer parameters than its {outputs} x {inputs} x {places}"
        return ""

    def made(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterator[tuple[str, Made]]:
        for name, each in ctx.progress.track(found.items(), "finding factors", len(found)):
            whole, weight = each.parameter().numel(), each.parameter().detach().float()
            ranks = self._ranks(each, self.multiple or ctx.width_multiple)
            parts = tucker(weight, ranks)
            near = _product(parts).reshape(weight.shape)
            spent = self._parameters(*ranks, *sizes(each))
            text = f"ranks {ranks[0]} and {ranks[1]}: {shown(spent, whole, missed_energy(weight, near))}"
            yield name, Made(_layers(each.layer, parts), text)

    def _ranks(self, matrix: Matrix, multiple: int) -> tuple[int, int]:
        outputs, inputs, places = sizes(matrix)
        budget, found = self.keep * outputs * inputs * places, (1, 1)
        for step in range(1, max(outputs, inputs) + 1):
            share = step / max(outputs, inputs)
            ranks = max(1, round(share * outputs)), max(1, round(share * inputs))
            if self._parameters(*ranks, outputs, inputs, places) > budget:
                break
            found = ranks
        return rounded(found[0], multiple), rounded(found[1], multiple)

    @staticmethod
    def _parameters(one: int, other: int, outputs: int, inputs: int, places: int) -> int:
        return outputs * one + one * other * places + other * inputs


def no_kernel(matrix: Matrix) -> str:
    """Why a layer has no kernel to factor; empty if it has."""
    if not isinstance(matrix.layer, Convolution) or sizes(matrix)[2] < 2:
        return "is no convolution with a kernel above one; factor.svd is for it"
    if matrix.layer.groups > 1:
        return "has groups of channels, which are thin already"
    return ""


def sizes(matrix: Matrix) -> tuple[int, int, int]:
    """Outputs, inputs, and places of the kernel."""
    outputs, inputs = matrix.parameter().shape[:2]
    return outputs, inputs, matrix.parameter()[0, 0].numel()


def _product(parts: Tucker) -> Tensor:
    """The weight [outputs, inputs, places] that the factors stand for."""
    core = parts.core.flatten(2)
    return (parts.outputs @ (parts.inputs @ core.movedim(2, 0).mT).mT).movedim(0, 2)


def _layers(layer: nn.Module, parts: Tucker) -> Factored:
    assert isinstance(layer, Convolution)
    one, other = parts.core.shape[:2]
    kernel = with_kernel(layer, other, one)
    first = filled(pointwise(layer, layer.in_channels, other), parts.inputs.T)
    last = pointwise(layer, one, layer.out_channels, layer.bias is not None)
    return Factored(first, filled(kernel, parts.core), filled(last, parts.outputs, layer.bias))
