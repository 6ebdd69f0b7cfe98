"""factor.cp: a pointwise, two depthwise and a pointwise convolution in place of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from torch import Tensor, nn

from ...core.context import Context
from ...model.factored import Factored
from ...model.matrices import Matrix
from ...model.replacing import Made, filled, missed_energy, shown
from .factoring import Factoring
from .networks import cp, outer
from .tucker import no_kernel


class CanonicalPolyadic(Factoring, kind="factor.cp"):
    """Put four layers in place of each two-dimensional convolution: other channels, a column of the kernel, a row of
    it, the outputs; the two in the middle work channel by channel.

    The weight becomes a sum of outer products (canonical polyadic decomposition), found by alternating least squares;
    their number is the largest that `keep` allows each layer. With `kernel` "whole" the two in the middle are one
    depthwise convolution: an inverted bottleneck where there are more terms than channels. Stride, padding and dilation
    stay with the kernel. With `retrain` the network is then trained, which it seldom goes without.
    """

    paper: ClassVar[str] = "arXiv:1412.6553"

    kernel: Literal["split", "whole"] = "split"

    def obstacle(self, matrix: Matrix) -> str:
        if not isinstance(matrix.layer, nn.Conv2d):
            return "is no two-dimensional convolution; factor.svd or factor.tucker may be for it"
        if reason := no_kernel(matrix):
            return reason
        if self._rank(matrix.parameter()) < 1:
            return f"keep={self.keep} allows not one term of its {' x '.join(map(str, matrix.parameter().shape))}"
        return ""

    def made(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterator[tuple[str, Made]]:
        for name, each in ctx.progress.track(found.items(), "finding factors", len(found)):
            weight, rank = self._modes(each.parameter().detach().float()), self._rank(each.parameter())
            factors = cp(weight, rank, ctx.generator(f"{self.kind}:{name}"))
            text = shown(rank * sum(weight.shape), weight.numel(), missed_energy(weight, outer(factors)))
            yield name, Made(_layers(each.layer, factors), f"{rank} terms: {text}")

    def _rank(self, weight: Tensor) -> int:
        return int(self.keep * weight.numel()) // sum(self._modes(weight).shape)

    def _modes(self, weight: Tensor) -> Tensor:
        """The weight by outputs, inputs, and the kernel as two modes or one."""
        return weight if self.kernel == "split" else weight.flatten(2)


def _layers(layer: nn.Module, factors: list[Tensor]) -> Factored:
    assert isinstance(layer, nn.Conv2d)
    outputs, inputs, *kernels = factors
    rank = outputs.shape[1]
    first = filled(nn.Conv2d(layer.in_channels, rank, 1, bias=False), inputs.T)
    last = filled(nn.Conv2d(rank, layer.out_channels, 1, bias=layer.bias is not None), outputs, layer.bias)
    if len(kernels) == 1:
        return Factored(first, _depthwise(layer, kernels[0], (True, True)), last)
    high, wide = kernels
    return Factored(first, _depthwise(layer, high, (True, False)), _depthwise(layer, wide, (False, True)), last)


def _depthwise(layer: nn.Conv2d, kernels: Tensor, along: tuple[bool, bool]) -> nn.Module:
    """A convolution of each channel with one of these kernels [places, channels], applied as `layer` is along some axes
    and not at all along the others.
    """
    rank = kernels.shape[1]

    def only(value: tuple[int, ...], otherwise: int) -> tuple[int, int]:
        high, wide = (own if chosen else otherwise for own, chosen in zip(value, along))
        return high, wide

    padding = layer.padding if isinstance(layer.padding, str) else only(layer.padding, 0)
    size, stride, spread = only(layer.kernel_size, 1), only(layer.stride, 1), only(layer.dilation, 1)
    made = nn.Conv2d(
        rank, rank, size, stride, padding, spread, groups=rank, bias=False, padding_mode=layer.padding_mode
    )
    return filled(made, kernels.T)
