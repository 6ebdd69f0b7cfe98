"""Layers that compute with a part of their units: smaller matrices, taken out of the whole ones for one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class Units:
    """Hidden units of which a part is drawn for each batch: `positions[layer]` [units, indices] says where each lies.

    Producers and norms are cut along their outputs, consumers along their inputs; `kept` holds the units drawn now.
    """

    name: str
    count: int
    keep: int
    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor]
    kept: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def draw(self, generator: torch.Generator) -> None:
        """Draw the units that the next batch is computed with; all are equally likely."""
        self.kept = torch.randperm(self.count, generator=generator)[: self.keep].sort().values

    @property
    def scale(self) -> float:
        """What the inputs of consumers are multiplied by, so that their sum is as expected with all units."""
        return self.count / self.keep


@dataclass
class Cut:
    """What of one layer is computed with: units of its outputs, units of its inputs, either or both."""

    outputs: Units | None = None
    inputs: Units | None = None

    def rows(self, layer: str, device: torch.device) -> Tensor | None:
        return None if self.outputs is None else indices(self.outputs.outputs[layer], self.outputs.kept, device)

    def columns(self, layer: str, device: torch.device) -> Tensor | None:
        return None if self.inputs is None else indices(self.inputs.inputs[layer], self.inputs.kept, device)


def indices(positions: Tensor, kept: Tensor, device: torch.device) -> Tensor:
    """The indices along a dimension that go with the kept units, in ascending order."""
    return positions[kept].flatten().sort().values.to(device)


def part(weight: Tensor, rows: Tensor | None, columns: Tensor | None, scale: float) -> Tensor:
    """The rows and columns of `weight` (outputs, inputs, kernel...); where columns are chosen, times `scale`."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    return weight if columns is None else weight.index_select(1, columns) * scale


def cuts(groups: list[Units]) -> dict[str, Cut]:
    """What each layer computes with, by name; a layer may stand behind one group of units and before another."""
    found: dict[str, Cut] = {}
    for units in groups:
        for name in units.outputs:
            found.setdefault(name, Cut()).outputs = units
        for name in units.inputs:
            found.setdefault(name, Cut()).inputs = units
    return found


@contextmanager
def in_part(model: nn.Module, layers: Mapping[str, Cut]) -> Iterator[None]:
    """Within this block the named layers compute with the units that are drawn at that time."""
    modules = {name: model.get_submodule(name) for name in layers}
    for name, module in modules.items():
        module.forward = _forward(name, module, layers[name])
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward  # the class's own is there again


def _forward(name: str, module: nn.Module, cut: Cut) -> Callable[[Tensor], Tensor]:
    if isinstance(module, _BatchNorm):
        return lambda x: normalized(module, x, cut.rows(name, x.device))

    def forward(x: Tensor) -> Tensor:
        rows, columns = cut.rows(name, x.device), cut.columns(name, x.device)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        small = part(weight, rows, columns, cut.inputs.scale if cut.inputs else 1.0)
        bias = bias.index_select(0, rows) if isinstance(bias, Tensor) and rows is not None else bias
        if isinstance(module, CONVOLUTIONS):
            return module._conv_forward(x, small, bias)  # type: ignore[arg-type]
        return functional.linear(x, small, bias)  # type: ignore[arg-type]

    return forward


def normalized(norm: _BatchNorm, x: Tensor, rows: Tensor | None) -> Tensor:
    """Batch norm of the kept channels; the running statistics of the others stay as they are."""
    assert rows is not None and norm.running_mean is not None and norm.running_var is not None
    mean, variance = norm.running_mean[rows], norm.running_var[rows]
    weight, bias = (None if each is None else each.index_select(0, rows) for each in (norm.weight, norm.bias))
    out = functional.batch_norm(x, mean, variance, weight, bias, True, norm.momentum or 0.0, norm.eps)
    norm.running_mean.index_copy_(0, rows, mean)
    norm.running_var.index_copy_(0, rows, variance)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    return out
