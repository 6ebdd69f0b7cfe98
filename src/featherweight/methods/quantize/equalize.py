"""Cross-layer equalization: channels between two layers rescaled so that both weights use their grids alike.

Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", arXiv:1906.04721, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from ...model.norms import CONVOLUTIONS, LINEAR, TRANSPOSED, attribute

aten = torch.ops.aten
ROUNDS = 40
CLOSE = 1e-3  # scales as near to 1 as this end the rounds
NEGLIGIBLE = 1e-4  # channels of a smaller range, relative to the largest of their layer, are dead
MOST = 100.0  # scales of a pair stay from 1 / MOST to MOST, over all rounds
# What gives s * f(x) for f(s * x) with any s above 0, channel by channel.
HOMOGENEOUS = frozenset(
    {
        aten.relu.default, aten.relu_.default, aten.leaky_relu.default, aten.leaky_relu_.default,
        aten.max_pool1d.default, aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default,
        aten.upsample_nearest2d.vec, aten.dropout.default, aten.alias.default, aten.clone.default,
    }
)  # fmt: skip
PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})


@dataclass(frozen=True)
class Pair:
    """Two layers of which the second alone reads what the first gives, channel by channel."""

    first: fx.Node
    second: fx.Node


def equalizing_scales(first: Tensor, second: Tensor, before: Tensor | None = None) -> Tensor:
    """The scales by which the ranges `first` (of the first weight's output channels) and `second` (of the second
    weight's input channels) become equal: `first / s` and `second * s` are both their geometric mean (equation 11).

    Channels of which a range is negligible (below 1e-4 of the largest of its side) keep theirs: 1. The product with
    `before`, the scales that the channels already have, stays between 1/100 and 100. Without these bounds a channel
    that training has silenced (ranges of 1e-30 beside 1) makes biases, and with them ranges of activations, explode.
    """
    alive = (first > NEGLIGIBLE * first.max()) & (second > NEGLIGIBLE * second.max())
    held = torch.ones_like(first, dtype=torch.float64) if before is None else before
    scales = (held * (first.double() / second.double()).sqrt()).clamp(1 / MOST, MOST) / held
    return torch.where(alive, scales, torch.ones_like(scales))


@torch.no_grad()
def equalize(module: fx.GraphModule, layers: dict[str, fx.Node]) -> list[str]:
    """Rescale, in place, the channels between all pairs of these layers until nothing changes; gives their names.

    The outputs of the network stay as they are, up to rounding. Chains of depthwise and pointwise convolutions are
    gone through as pairs, again and again: the scales of one pair change the ranges of the next.
    """
    named = {node: name for name, node in layers.items()}
    pairs = [pair for node in layers.values() if (pair := _pair(node, named)) is not None]
    scales: dict[Pair, Tensor] = {}
    for _ in range(ROUNDS):
        changed = [_equalize(module, pair, scales) for pair in pairs]  # all of them, in order
        if not any(changed):
            break
    return sorted({named[node].rpartition(".")[0] for pair in scales for node in (pair.first, pair.second)})


def _pair(first: fx.Node, named: dict[fx.Node, str]) -> Pair | None:
    """The pair that begins with this layer; None if more than one layer reads it, or not channel by channel."""
    node = first
    while True:
        users = list(node.users)
        if len(users) != 1 or users[0].all_input_nodes[0] is not node:
            return None
        node = users[0]
        if node in named:
            return Pair(first, node) if _fit(first, node) else None
        if not _homogeneous(node):
            return None


def _homogeneous(node: fx.Node) -> bool:
    if node.target is aten.mean.dim:
        value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
        places = node.args[1]
        assert isinstance(places, list | tuple)
        return value is not None and value.dim() == 4 and {int(place) % 4 for place in places} == {2, 3}  # type: ignore[arg-type]
    if node.target in PADS:
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        if node.target is aten.constant_pad_nd.default:
            value = node.args[2] if len(node.args) > 2 else 0
        amounts = node.args[1]
        return isinstance(amounts, list | tuple) and len(amounts) <= 4 and not value
    return node.target in HOMOGENEOUS


def _fit(first: fx.Node, second: fx.Node) -> bool:
    """Whether the second layer's input channels are the first one's output channels, each weight used once."""
    once = all(
        isinstance(item, fx.Node) and len(item.users) == 1
        for node in (first, second)
        for item in node.args[1:3]
        if item is not None
    )
    known = all(node.meta.get("val") is not None for node in (first, second))
    linear = second.target != LINEAR or (known and second.meta["val"].dim() == 2)
    plain = all(node.target not in TRANSPOSED for node in (first, second))
    flat = first.target != LINEAR or (known and first.meta["val"].dim() == 2)
    return once and linear and plain and flat


def _equalize(module: fx.GraphModule, pair: Pair, before: dict[Pair, Tensor]) -> bool:
    """Rescale one pair, whose scales so far stand in `before`; whether that changed anything to speak of."""
    one, other = (attribute(module, node.args[1].target) for node in (pair.first, pair.second))  # type: ignore[union-attr]
    groups = _groups(pair.second)
    rows = by_input(other, groups)
    if len(one) != len(rows):
        return False
    held = before.get(pair, torch.ones(len(one), dtype=torch.float64, device=one.device))
    scales = equalizing_scales(one.flatten(1).abs().amax(1), rows.abs().amax(1), held)
    if bool((scales.log().abs() < CLOSE).all()):
        return False
    before[pair] = held * scales
    _assign(one, (one.double() / _column(scales, one)).to(one.dtype))
    bias = pair.first.args[2] if len(pair.first.args) > 2 else None
    if isinstance(bias, fx.Node):
        plain = attribute(module, bias.target)
        _assign(plain, (plain.double() / scales).to(plain.dtype))
    _assign(other, scaled_inputs(other, scales, groups))
    return True


def by_input(weight: Tensor, groups: int = 1) -> Tensor:
    """The entries of a convolution's or linear layer's weight that each input channel meets: channels x the rest."""
    grouped = weight.unflatten(0, (groups, -1))  # groups x outputs x inputs of a group x ...
    return grouped.movedim(2, 1).flatten(0, 1).flatten(1)


def scaled_inputs(weight: Tensor, scales: Tensor, groups: int = 1) -> Tensor:
    """The weight with what each input channel meets multiplied by that channel's scale."""
    grouped = weight.double().unflatten(0, (groups, -1))
    shape = [groups, 1, weight.shape[1], *[1] * (weight.dim() - 2)]
    return (grouped * scales.double().reshape(shape)).flatten(0, 1).to(weight.dtype)


def _groups(node: fx.Node) -> int:
    return int(node.args[6]) if node.target in CONVOLUTIONS and len(node.args) > 6 else 1  # type: ignore[arg-type]


def _column(scales: Tensor, weight: Tensor) -> Tensor:
    return scales.reshape(-1, *[1] * (weight.dim() - 1))


def _assign(held: Tensor, value: Tensor) -> None:
    assert isinstance(held, nn.Parameter) or not held.requires_grad
    held.data = value
