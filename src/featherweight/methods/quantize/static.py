"""quantize.static: weights and activations in 8 bits, with ranges from calibration data."""

from __future__ import annotations

import copy
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context
from featherweight.core.encoding import Sparse
from featherweight.core.errors import NotFinite, TaskError
from featherweight.core.soft import Link, chains, encodings, fold
from featherweight.core.step import OneOf, Place, Trait
from featherweight.model.graph import captured
from featherweight.model.norms import TRANSPOSED, attribute, without_norms
from featherweight.model.port import Port
from featherweight.model.rounding import Rounding
from featherweight.model.select import LayerStep, excluded, patterns

from .arithmetic import affine_of_range, scale_by_error, scale_by_max
from .placement import Placement, place, weight_name
from .ranges import Calibration, Histogram, activation_range


class StaticQuantization(LayerStep, kind="quantize.static"):
    """Store the weights of convolutions and linear layers as 8-bit integers and compute on 8-bit activations.

    Batch norm is folded first, unless that changes the outputs beyond rounding. Weights are symmetric per output
    channel (`weights`: scales by the largest magnitude, or by least squared error); activations are affine per tensor,
    with ranges from the calibration split by `calibration`. Ports stand at the inputs of these layers, at the outputs
    of convolutions, and around additions, concatenations and poolings between them, so that a runtime can keep integers
    throughout. The model becomes a captured graph: it can still be trained, not reshaped. Raises `NotFinite` if
    calibration meets NaN.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"int8"})
    place: ClassVar[Place | None] = Place.ENCODE
    paper: ClassVar[str] = "arXiv:1712.05877"

    calibration: Annotated[Calibration, OneOf("minmax", "percentile", "mse", "entropy")] = "minmax"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    weights: Annotated[Literal["max", "mse"], OneOf("max", "mse")] = "max"

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        links = {name: chain for name, _, _, chain in chains(model)}
        stored = {name for name, encoding in encodings(model).items() if not isinstance(encoding, Sparse)}
        free = {name: ctx.task.free(name) for name in ctx.example}
        module = captured(fold(model), ctx.example, free)
        module, folded, unequal = without_norms(module, ctx.example, frozenset(stored))
        if unequal:
            ctx.warn(f"{self.kind}: batch norms are not folded, which would change the outputs: {unequal}")
        for layer in folded:
            ctx.change(layer, "batch norm folded in")
        _keep_links(module, links)
        wanted = self._choose(module, stored, ctx)
        if not wanted:
            return model
        placement = place(module.graph, wanted)
        _observe(module, placement, ctx, self)
        for name, node in placement.layers.items():
            _round_weight(module, name, node, self.weights)
            layer = name.rpartition(".")[0]
            norm = ", batch norm folded in" if layer in folded else ""
            ctx.change(layer, f"int8 weight per channel, 8-bit activations{norm}")
        return module

    def _choose(self, module: fx.GraphModule, stored: set[str], ctx: Context) -> set[str]:
        """The weights to quantize; every other layer that has parameters is reported as left alone."""
        chosen: set[str] = set()
        layers = [name for node in module.graph.nodes if (name := weight_name(node)) is not None]
        for name in layers:
            layer = name.rpartition(".")[0]
            reason = "is already stored in integers" if name in stored else excluded(layer, self.only, self.skip)
            if reason is None:
                chosen.add(name)
            else:
                ctx.leave(layer, reason)
        for glob in (*patterns(self.only), *self.skip):
            if glob != "*" and not any(fnmatchcase(name.rpartition(".")[0], glob) for name in layers):
                ctx.warn(f"{self.kind}: no layer matches {glob!r}")
        owners = {name.rpartition(".")[0] for name, _ in module.named_parameters() if ".parametrizations." not in name}
        for layer in sorted(owners - {name.rpartition(".")[0] for name in layers}):
            ctx.leave(layer, "neither a convolution nor a linear layer; stays in floats")
        return chosen


def _keep_links(module: fx.GraphModule, links: dict[str, list[Link]]) -> None:
    """Put masks and the like back on the captured weights, so that they still hold when the model is trained."""
    for name, chain in links.items():
        prefix, _, last = name.rpartition(".")
        for link in chain:
            parametrize.register_parametrization(module.get_submodule(prefix), last, copy.deepcopy(link))


def _observe(module: fx.GraphModule, placement: Placement, ctx: Context, step: StaticQuantization) -> None:
    """Measure the range of every source over the calibration split, one pass, and put the ports in."""
    histograms = _collect(module, placement.sources, ctx)
    settings: dict[fx.Node, tuple[float, int]] = {}
    for node, histogram in histograms.items():
        settings[node] = affine_of_range(*activation_range(histogram, step.calibration, step.percentile))
    for value, origin in placement.shared.items():
        settings[value] = settings[origin]
    ports = nn.Module()
    module.add_module("ports", ports)
    for value, (scale, zero) in settings.items():
        name = f"ports.{value.name}"
        ports.add_module(value.name, Port(scale, zero))
        with module.graph.inserting_after(value):
            port = module.graph.call_module(name, (value,))
        port.meta = dict(value.meta)
        for user in list(value.users):
            if user is not port:
                user.replace_input_with(value, port)
    module.graph.lint()
    module.recompile()


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
def _collect(module: fx.GraphModule, sources: list[fx.Node], ctx: Context) -> dict[fx.Node, Histogram]:
    histograms = {node: Histogram() for node in sources}
    collector, seen = _Collector(module.eval(), histograms), 0
    for batch in ctx.progress.track(ctx.batches("calibrate"), "calibrating"):
        named: dict[str, Tensor] = ctx.task.named_inputs(batch)
        collector.run(*named.values())
        seen += 1
    if not seen:
        raise TaskError(f"task {ctx.task.name}: the 'calibrate' data gave no batch, which quantize.static needs")
    return histograms


def _round_weight(module: fx.GraphModule, name: str, node: fx.Node, method: str) -> None:
    axis = 1 if node.target in TRANSPOSED else 0
    weight = attribute(module, name)
    scale = scale_by_max(weight, axis) if method == "max" else scale_by_error(weight, axis)
    prefix, _, last = name.rpartition(".")
    parametrize.register_parametrization(module.get_submodule(prefix), last, Rounding(scale, axis=axis))
