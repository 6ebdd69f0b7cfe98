"""Bias correction: what quantization adds to the mean of a layer's outputs is taken off its bias.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv:1906.04721, section 4.2
(empirical form, appendix D): layer by layer, with inputs from the network as it is quantized so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ...model.flow import Flow
from ...model.norms import LINEAR, attribute
from ...model.port import Port
from .placement import moved_from


class ChannelMean:
    """The running mean of a stream of outputs for each index of dimension `axis`; float64."""

    def __init__(self, axis: int):
        self.axis, self.total, self.count = axis, Tensor(), 0

    def add(self, values: Tensor) -> None:
        rows = values.detach().movedim(self.axis, 0).flatten(1).double()
        total = rows.sum(1)
        self.total = total if not self.count else self.total + total
        self.count += rows.shape[1]

    def mean(self) -> Tensor:
        """One entry per channel."""
        return self.total / max(1, self.count)


def corrected(bias: Tensor, wanted: ChannelMean, got: ChannelMean) -> Tensor:
    """The bias with which the mean of what was `got` becomes that of what was `wanted`, in the bias's type."""
    return (bias.double() + wanted.mean() - got.mean()).to(bias.dtype)


@torch.no_grad()
def correct_biases(
    module: fx.GraphModule,
    layers: Mapping[str, fx.Node],
    batches: Callable[[], Iterable[Sequence[Tensor]]],
    plain: Mapping[str, Tensor],
) -> list[str]:
    """Correct, in place, the biases of these layers one after the other; gives the names of those that have one.

    `plain` holds what the tensors were in floats, by full name; for the memory that this takes see `Flow`.
    """
    floats, quantized = Flow(module, batches(), plain, ports=False), Flow(module, batches())
    places = {node: place for place, node in enumerate(module.graph.nodes)}
    done = []
    for name, node in layers.items():
        bias = node.args[2] if len(node.args) > 2 else None
        if not isinstance(bias, fx.Node) or bias.op != "get_attr" or len(bias.users) != 1:
            continue
        axis = -1 if node.target == LINEAR else 1
        wanted, got = ChannelMean(axis), ChannelMean(axis)
        for flow, mean in ((floats, wanted), (quantized, got)):
            flow.advance(places[node])
            for values in flow:
                mean.add(flow.runner.part([node], values)[node])
        held = attribute(module, bias.target)
        held.data = corrected(held, wanted, got)
        done.append(name.rpartition(".")[0])
    return done


@torch.no_grad()
def round_bias(module: fx.GraphModule, name: str, node: fx.Node) -> None:
    """Put the bias of a layer, the operation `node` on the weight `name`, on multiples of its input's step times its
    weight's; in place.

    Integer kernels add it as such a number, and in few bits these are so coarse that a model with other biases is not
    the one that is deployed. A bias that several operations read stays as it is, as does one without a port before it.
    """
    bias, given = node.args[2] if len(node.args) > 2 else None, moved_from(node.args[0])
    if not isinstance(bias, fx.Node) or bias.op != "get_attr" or len(bias.users) != 1:
        return
    port = module.get_submodule(str(given.target)) if given is not None and given.op == "call_module" else None
    if isinstance(port, Port):
        prefix, _, last = name.rpartition(".")
        links: Any = module.get_submodule(prefix).parametrizations
        held = attribute(module, bias.target)
        unit = links[last][-1].scale * port.scale
        held.data = ((held / unit).round() * unit).to(held.dtype)
