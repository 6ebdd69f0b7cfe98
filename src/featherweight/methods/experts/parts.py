"""A feed-forward cut into experts, and the router fitted to which of them matter. Pure functions on tensors.

`hidden` [tokens, neurons] is what the last layer gets, `down` [outputs, neurons] its weight; an expert is a set of
neurons, and its output for a token `hidden[:, set] @ down[:, set].T`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...model.experts import FeedForward, feed_forward
from ...model.feedforwards import linear, own_activation


def energies(hidden: Tensor, down: Tensor) -> Tensor:
    """What each neuron adds on average, squared: [neurons]."""
    return hidden.double().square().mean(0) * down.double().square().sum(0)


def activity(hidden: Tensor, down: Tensor, most: int = 512) -> Tensor:
    """How strongly each neuron acts on some tokens, [neurons, tokens], each row of length one: alike ones act
    together.
    """
    some = hidden[:: max(1, len(hidden) // most)].double().abs() * down.double().norm(dim=0)
    return torch.nn.functional.normalize(some.T, dim=1)


def part(whole: FeedForward, neurons: Tensor, bias: Tensor | None = None) -> FeedForward:
    """The expert of these neurons, with `bias` [outputs] added to its output."""

    def rows(layer: torch.nn.Linear) -> torch.nn.Linear:
        return linear(layer.weight[neurons], None if layer.bias is None else layer.bias[neurons])

    gate = None if whole.gate is None else rows(whole.gate)
    down = linear(whole.down.weight[:, neurons], bias)
    return feed_forward(rows(whole.up), own_activation(whole.act), down, gate)


def needs(hidden: Tensor, down: Tensor, sets: list[Tensor], means: Tensor) -> Tensor:
    """How far each expert's output is from its mean [experts, outputs]: what a token loses without it.

    Gives lengths [tokens, experts].
    """
    found = [(hidden[:, each] @ down[:, each].T - mean).norm(dim=1) for each, mean in zip(sets, means)]
    return torch.stack(found, 1)


def fitted_router(tokens: Tensor, wanted: Tensor, damping: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Weight [experts, inputs] and bias [experts] of the linear map of tokens [n, inputs] nearest to `wanted`
    [n, experts], by ridge regression.
    """
    x, y = tokens.double(), wanted.double()
    middle, level = x.mean(0), y.mean(0)
    x = x - middle
    system = x.T @ x
    system.diagonal().add_(damping * system.diagonal().mean().clamp_min(1e-30))
    weight = torch.linalg.solve(system, x.T @ (y - level)).T
    return weight.to(tokens.dtype), (level - weight @ middle).to(tokens.dtype)


def unselected_means(outputs: Tensor, selected: Tensor) -> Tensor:
    """The mean output of an expert over the tokens that are not sent to it; over all where all are.

    `outputs` [tokens, outputs], `selected` [tokens]. It is what best stands for the expert where it is left out.
    """
    rest = outputs[~selected]
    return (rest if len(rest) else outputs).mean(0)
