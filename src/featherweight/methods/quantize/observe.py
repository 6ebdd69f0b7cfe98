"""Ports and roundings put into a captured graph, with grids from what calibration data and weights are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from ...core.context import Context
from ...core.errors import NotFinite, TaskError
from ...model.norms import attribute
from ...model.port import Port
from ...model.rounding import Rounding
from .arithmetic import affine_of_range, scale_by_error, scale_by_max, symmetric_of_range
from .placement import Placement
from .ranges import Calibration, Histogram, activation_range


class Ranges(Protocol):
    """How a range is read off a histogram."""

    @property
    def calibration(self) -> Calibration: ...
    @property
    def percentile(self) -> float: ...
    @property
    def symmetric(self) -> bool: ...


class _Collector(fx.Interpreter):
    """Runs a captured graph and counts the values of chosen nodes."""

    def __init__(self, module: fx.GraphModule, histograms: dict[fx.Node, Histogram]):
        super().__init__(module)
        self.histograms = histograms

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if node in self.histograms:
            try:
                self.histograms[node].add(result)
            except ValueError as error:
                raise NotFinite(f"calibration: the value {node.name!r} holds NaN or infinite entries") from error
        return result


@torch.no_grad()
def observe(module: fx.GraphModule, sources: list[fx.Node], ctx: Context) -> dict[fx.Node, Histogram]:
    """A histogram of each of these values over the calibration split, in one pass.

    Raises `TaskError` if there are no data or they do not fit the model, `NotFinite` if a value is.
    """
    histograms = {node: Histogram() for node in sources}
    collector, seen = _Collector(module.eval(), histograms), 0
    for batch in ctx.progress.track(ctx.batches("calibrate"), "calibrating"):
        named = ctx.task.named_inputs(batch)
        _check(named, ctx)
        collector.run(*named.values())
        seen += 1
    if not seen:
        raise TaskError(f"task {ctx.task.name}: the 'calibrate' data gave no batch, which calibration needs")
    return histograms


def _check(named: Mapping[str, torch.Tensor], ctx: Context) -> None:
    """Refuse a batch whose shapes are none that the graph was captured for."""
    for name, example in ctx.example.items():
        given, free = named.get(name), ctx.task.free(name)
        shape = None if given is None else list(given.shape)
        wanted = [("any" if place in free else size) for place, size in enumerate(example.shape)]
        if shape is None or len(shape) != len(wanted) or any(w not in ("any", s) for s, w in zip(shape, wanted)):
            raise TaskError(
                f"task {ctx.task.name}: the 'calibrate' data hold {name!r} of shape {shape}, "
                f"but the model was captured for {wanted}; give batches of that shape, or name it in `dynamic`"
            )


def insert_ports(
    module: fx.GraphModule,
    placement: Placement,
    histograms: Mapping[fx.Node, Histogram],
    bits: Mapping[fx.Node, int],
    ranges: Ranges,
) -> None:
    """Put the ports in: `bits` for each source, and what only moves a source's values on the same grid."""
    grids: dict[fx.Node, tuple[float, int, int]] = {}
    for node, histogram in histograms.items():
        low, high = activation_range(histogram, ranges.calibration, ranges.percentile, bits[node], ranges.symmetric)
        grid = (symmetric_of_range if ranges.symmetric else affine_of_range)(low, high, bits[node])
        grids[node] = (*grid, bits[node])
    for value, origin in placement.shared.items():
        grids[value] = grids[origin]
    module.add_module("ports", ports := nn.Module())
    for value, each in grids.items():
        ports.add_module(value.name, Port(*each))
        with module.graph.inserting_after(value):
            port = module.graph.call_module(f"ports.{value.name}", (value,))
        port.meta = dict(value.meta)
        for user in list(value.users):
            if user is not port and placement.reads(user, value):
                user.replace_input_with(value, port)
    module.graph.lint()
    module.recompile()


def round_weight(module: fx.GraphModule, name: str, axis: int, bits: int, method: str) -> Rounding:
    """Hold a weight on the nearest points of a symmetric grid with a scale per index of `axis`; gives that link."""
    weight = attribute(module, name)
    scale = scale_by_max(weight, axis, bits) if method == "max" else scale_by_error(weight, axis, bits)
    prefix, _, last = name.rpartition(".")
    link = Rounding(scale, axis=axis, bits=bits)
    parametrize.register_parametrization(module.get_submodule(prefix), last, link)
    return link
