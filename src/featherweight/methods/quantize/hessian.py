"""Second moments of what flows into layers: the Hessian of the squared output error, from calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import NotFinite, TaskError

OBSERVED = (nn.Linear, nn.Conv1d, nn.Conv2d)
ROWS = 8192  # of one product: bounds the memory that the patches of a convolution take


def hessians(model: nn.Module, names: list[str], ctx: Context) -> dict[str, Tensor]:
    """`X^T X / n` over the calibration split for each named layer: float32, [groups, inputs, inputs] on its device.

    `X` holds the n rows that the layer multiplies with its weight: the vectors into a linear layer (one group), the
    patches under the kernel of a convolution, apart for each of its groups. `inputs` is the size of one row of the
    weight. One pass for all names; only one matrix per layer and group is kept, whatever the data: call it with few
    names at a time where these are large. Raises `TaskError` if a layer is never called or there are no data,
    `NotFinite` if an input is.
    """
    modules = dict(model.named_modules())
    sums = {name: Moment() for name in names}
    ctx.observe(model, {name: _hook(name, modules[name], sums[name]) for name in names})
    for name, moment in sums.items():
        if not moment.count:
            raise TaskError(f"the layer {name!r} met no calibration data; skip it, or give data that reach it")
        if not torch.isfinite(moment.matrix).all():
            raise NotFinite(f"calibration: the inputs of the layer {name!r} hold NaN or infinite entries")
    return {name: moment.matrix for name, moment in sums.items()}


class Moment:
    """The running mean of `x x^T` over rows, [groups, inputs, inputs]."""

    def __init__(self) -> None:
        self.matrix, self.count = torch.zeros(0), 0

    def add(self, rows: Tensor) -> None:
        """Take in `rows`, [groups, n, inputs]."""
        if not rows.shape[1]:
            return
        if not self.count:
            self.matrix = torch.zeros(rows.shape[0], rows.shape[2], rows.shape[2], device=rows.device)
        self.count += rows.shape[1]
        self.matrix *= 1 - rows.shape[1] / self.count
        self.matrix.baddbmm_(rows.mT, rows, alpha=1 / self.count)


def _hook(name: str, layer: nn.Module, moment: Moment) -> Callable[[tuple[Any, ...], Any], None]:
    def take(given: tuple[Any, ...], _output: Any) -> None:
        if not given:
            raise TaskError(f"the layer {name!r} is given its input by keyword, which cannot be observed; skip it")
        for rows in chunks(layer, given[0].detach().float()):
            moment.add(rows)

    return take


def chunks(layer: nn.Module, given: Tensor) -> Iterator[Tensor]:
    """The rows that `layer` multiplies with its weight, in pieces of about `ROWS`: [groups, n, inputs] each."""
    if isinstance(layer, nn.Linear):
        yield from given.reshape(1, -1, given.shape[-1]).split(ROWS, 1)
        return
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    places = given[0, 0].numel() if given.dim() == layer.weight.dim() else given[0].numel()
    batch = given if given.dim() == layer.weight.dim() else given[None]
    for part in batch.split(max(1, ROWS // places)):
        yield patches(layer, part)


def patches(layer: nn.Conv1d | nn.Conv2d, given: Tensor) -> Tensor:
    """The patches of `given` (N x channels x ...) under the kernel of `layer`: [groups, N * places, inputs]."""
    padded = nn.functional.pad(given, layer._reversed_padding_repeated_twice, _mode(layer.padding_mode))
    size, spread, step = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        padded, size, spread, step = padded[:, :, None], (1, *size), (1, *spread), (1, *step)
    columns = nn.functional.unfold(padded, size, spread, stride=step)  # N x (channels * kernel) x places
    grouped = columns.unflatten(1, (layer.groups, -1))
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)


def _mode(padding_mode: str) -> str:
    return "constant" if padding_mode == "zeros" else padding_mode
