"""quantize.static: weights and activations in few bits, with ranges from calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from featherweight.core.context import Context
from featherweight.core.encoding import Sparse
from featherweight.core.soft import chains, encodings, fold
from featherweight.core.step import OneOf, Place, Trait
from featherweight.model.graph import captured, keep_links
from featherweight.model.norms import TRANSPOSED, attribute, without_norms
from featherweight.model.rounding import Rounding
from featherweight.model.select import LayerStep, excluded, patterns

from .correct import correct_biases, round_bias
from .equalize import equalize
from .observe import insert_ports, observe, round_weight
from .placement import Placement, place, stored_weights, weight_name
from .ranges import Calibration, Histogram
from .reconstruct import reconstruct
from .segments import Segment, by_block, by_layer, with_ports
from .smooth import smooth

Bits = Annotated[int, Field(ge=2, le=8)]


class StaticQuantization(LayerStep, kind="quantize.static"):
    """Store weights as integers of few bits and compute on quantized activations, with ranges from calibration data.

    Batch norm is folded first, unless that changes the outputs beyond rounding. Weights get `bits`, symmetric per
    output channel (`weights`: scales by the largest magnitude, or by least squared error); activations
    `activation_bits`, per tensor, affine or `symmetric`, with ranges from the calibration split by `calibration`. Below
    8 bits, the first and the last layer get `ends` bits; `layer_bits` (glob on layer names -> bits) goes before all.

    Before that, `equalize` rescales channels between layers (arXiv:1906.04721), and `smooth` moves that share of the
    spread of activations into the weights of linear layers (arXiv:2211.10438). `rounding` is to the nearest integer, or
    learned in `iterations` steps so that each layer ("adaptive", AdaRound, arXiv:2004.10568) or each block of layers
    ("block", BRECQ, arXiv:2102.05426) gives what it gave before. `clipping` "learned" does so with the ranges of
    activations, from those of calibration on (arXiv:1902.08153, arXiv:2004.09576), block by block, together with
    `rounding` "block". `bias_correction` then takes what the means of layers have moved off their biases, which at last
    are put on the grid that integer kernels add them on. These see the calibration data layer by layer; what is kept
    between layers lies in memory up to 1 GiB, beyond that in a temporary folder.

    Ports stand at the inputs of convolutions and linear layers, at the outputs of convolutions, and around additions,
    concatenations and poolings between them, so that a runtime can keep integers throughout. The weights of embeddings
    (per row) and recurrent layers are only stored as integers. The model becomes a captured graph: it can still be
    trained, not reshaped. Raises `NotFinite` if calibration meets NaN, `TaskError` if there are no calibration data.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"int8"})
    place: ClassVar[Place | None] = Place.ENCODE
    paper: ClassVar[str] = "arXiv:1712.05877"

    bits: Bits = 8
    activation_bits: Bits = 8
    ends: Bits = 8
    layer_bits: dict[str, Bits] = Field(default_factory=dict)
    calibration: Annotated[Calibration, OneOf("minmax", "percentile", "mse", "entropy")] = "minmax"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    symmetric: bool = False
    weights: Annotated[Literal["max", "mse"], OneOf("max", "mse")] = "mse"
    equalize: bool = False
    smooth: Annotated[float, Field(ge=0, le=1)] | None = None
    rounding: Literal["nearest", "adaptive", "block"] = "nearest"
    clipping: Literal["calibrated", "learned"] = "calibrated"
    iterations: Annotated[int, Field(ge=1)] = 1000
    bias_correction: bool = True

    def forms(self) -> frozenset[str]:
        return frozenset(f"int{bits}" for bits in (self.bits, max(self.bits, self.ends), *self.layer_bits.values()))

    def alone(self) -> StaticQuantization:
        """Without what is learned or corrected on inputs from layers quantized before, whose errors it makes up for."""
        without = {"bias_correction": False, "rounding": "nearest", "clipping": "calibrated"}
        return self.model_copy(update=without)

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
        wanted = self._choose(module, stored, ctx)
        if not wanted:
            return model
        notes = {layer: ["batch norm folded in"] for layer in folded}
        self._rescale(module, wanted, notes, ctx)
        keep_links(module, links)
        placement = place(module.graph, wanted)
        bits = self._bits(placement)
        histograms = observe(module, placement.sources, ctx)
        placement = self._reached(module, wanted, placement, histograms, ctx)
        histograms = {node: histograms[node] for node in placement.sources}
        insert_ports(module, placement, histograms, self._port_bits(placement, bits), self)
        self._round(module, placement, bits, notes, ctx)
        for name in placement.layers:
            layer, width = name.rpartition(".")[0], self._port_bits_of(bits[name])
            ctx.change(layer, "; ".join([f"int{bits[name]} weight, {width}-bit activations", *notes.get(layer, [])]))
        for name in _tables(module.graph, wanted):
            width = self._named_bits(name) or self.bits
            round_weight(module, name, 0, width, self.weights)
            ctx.change(name.rpartition(".")[0], f"int{width} rows, computed with as floats")
        return module

    def _reached(
        self,
        module: fx.GraphModule,
        wanted: set[str],
        placement: Placement,
        histograms: Mapping[fx.Node, Histogram],
        ctx: Context,
    ) -> Placement:
        """The placement without layers that calibration never reached, such as those of an expert that no token is sent
        to: without a range they stay in floats, by name.
        """
        unseen = []
        for name, node in placement.layers.items():
            value = node.args[0]
            assert isinstance(value, fx.Node)
            if histograms[placement.shared.get(value, value)].empty:
                unseen.append(name)
        for name in unseen:
            ctx.leave(name.rpartition(".")[0], "no calibration data reach it, so that its ranges are not known")
        if unseen:
            ctx.warn(f"{self.kind}: {len(unseen)} layers that no calibration data reach stay in floats")
        wanted -= set(unseen)
        return place(module.graph, wanted) if unseen else placement

    def _rescale(self, module: fx.GraphModule, wanted: set[str], notes: dict[str, list[str]], ctx: Context) -> None:
        """Equalize and smooth, where asked for; what layers this changed goes to `notes`."""
        layers = place(module.graph, wanted).layers
        if self.equalize:
            for layer in equalize(module, layers):
                notes.setdefault(layer, []).append("channels equalized")
        if self.smooth is not None:
            for layer in smooth(module, layers, lambda: calibration(ctx), self.smooth):
                notes.setdefault(layer, []).append("inputs smoothed")

    def _round(
        self,
        module: fx.GraphModule,
        placement: Placement,
        bits: dict[str, int],
        notes: dict[str, list[str]],
        ctx: Context,
    ) -> None:
        """Put the weights on their grids, and repair what that does to the outputs of layers, as asked for."""
        plain = {str(n.target): _tensor(module, n) for n in module.graph.nodes if n.op == "get_attr"}
        links: dict[str, Rounding] = {}
        for name, node in placement.layers.items():
            links[name] = round_weight(module, name, channel_axis(node), bits[name], self.weights)
        self._learn(module, placement, links, plain, notes, ctx)
        if self.bias_correction:
            for layer in correct_biases(module, placement.layers, lambda: calibration(ctx), plain):
                notes.setdefault(layer, []).append("bias corrected")
        for name, node in placement.layers.items():
            round_bias(module, name, node)

    def _learn(
        self,
        module: fx.GraphModule,
        placement: Placement,
        links: dict[str, Rounding],
        plain: dict[str, Tensor],
        notes: dict[str, list[str]],
        ctx: Context,
    ) -> None:
        """Learn ranges and rounding, as asked for: both at once where they are learned in the same blocks."""
        blocks, ports = by_block(module.graph, placement.layers), placement.ports()
        passes: list[tuple[str, list[Segment], dict[str, Rounding], dict[str, str]]] = []
        if self.clipping == "learned":
            both = self.rounding == "block"
            text = "rounding and range learned" if both else "range learned"
            passes.append((text, with_ports(module.graph, blocks, ports), links if both else {}, ports))
        elif self.rounding == "block":
            passes.append(("rounding learned", blocks, links, {}))
        if self.rounding == "adaptive":
            passes.append(("rounding learned", by_layer(module.graph, placement.layers), links, {}))
        generator = ctx.generator("rounding")
        for text, segments, rounded, ranged in passes:
            batches, progress = (lambda: calibration(ctx)), ctx.progress
            gains = reconstruct(module, segments, rounded, ranged, batches, plain, self.iterations, generator, progress)
            for name, gain in gains.items():
                notes.setdefault(name.rpartition(".")[0], []).append(f"{text}, error / {gain:.2g}")

    # -- which layers, and how many bits -----------------------------------------------------------------------------
    def _choose(self, module: fx.GraphModule, stored: set[str], ctx: Context) -> set[str]:
        """The weights to quantize; every other layer that has parameters is reported as left alone."""
        chosen: set[str] = set()
        named = (name for node in module.graph.nodes for name in (weight_name(node), *stored_weights(node)))
        layers = list(dict.fromkeys(name for name in named if name is not None))
        for name in layers:
            layer = name.rpartition(".")[0]
            reason = "is already stored in integers" if name in stored else excluded(layer, self.only, self.skip)
            if reason is None:
                chosen.add(name)
            else:
                ctx.leave(layer, reason)
        for glob in (*patterns(self.only), *self.skip, *self.layer_bits):
            if glob != "*" and not any(fnmatchcase(name.rpartition(".")[0], glob) for name in layers):
                ctx.warn(f"{self.kind}: no layer matches {glob!r}")
        owners = {name.rpartition(".")[0] for name, _ in module.named_parameters() if ".parametrizations." not in name}
        for layer in sorted(owners - {name.rpartition(".")[0] for name in layers}):
            ctx.leave(layer, "no convolution, linear layer, embedding or recurrent layer; stays in floats")
        return chosen

    def _named_bits(self, name: str) -> int | None:
        """What `layer_bits` says of the layer of this weight."""
        layer = name.rpartition(".")[0]
        return next((bits for glob, bits in self.layer_bits.items() if fnmatchcase(layer, glob)), None)

    def _bits(self, placement: Placement) -> dict[str, int]:
        """Bits of each weight."""
        names = list(placement.layers)
        ends = {names[0], names[-1]} if names else set()
        return {
            name: self._named_bits(name) or (max(self.bits, self.ends) if name in ends else self.bits) for name in names
        }

    def _port_bits_of(self, weight_bits: int) -> int:
        """Bits of the input of a layer whose weight has so many: those that have more than the others keep 8."""
        return self.activation_bits if weight_bits <= self.bits else max(self.activation_bits, self.ends)

    def _port_bits(self, placement: Placement, bits: dict[str, int]) -> dict[fx.Node, int]:
        """Bits of each measured value: the most that a layer which reads it asks for. What no layer reads is not
        multiplied, only added or pooled, and keeps 8.
        """
        found: dict[fx.Node, int] = {}
        for name, node in placement.layers.items():
            value = node.args[0]
            assert isinstance(value, fx.Node)
            origin = placement.shared.get(value, value)
            found[origin] = max(found.get(origin, 0), self._port_bits_of(bits[name]))
        return {value: found.get(value, 8) for value in placement.sources}


def calibration(ctx: Context) -> Iterable[tuple[Tensor, ...]]:
    """The inputs of the model in each batch of the calibration split, in the order of its arguments."""
    for batch in ctx.batches("calibrate"):
        yield tuple(ctx.task.named_inputs(batch).values())


def channel_axis(node: fx.Node) -> int:
    """The output channel dimension of the weight of a convolution or linear operation."""
    return 1 if node.target in TRANSPOSED else 0


def _tables(graph: fx.Graph, wanted: set[str]) -> list[str]:
    """The wanted weights that are stored as integers only."""
    layers = {weight_name(node) for node in graph.nodes}
    found = dict.fromkeys(name for node in graph.nodes for name in stored_weights(node))
    return [name for name in found if name in wanted and name not in layers]


def _tensor(module: fx.GraphModule, node: fx.Node) -> Tensor:
    value = attribute(module, node.target)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
