"""What each expert is worth over the calibration data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...model.coverage import coverage_of
from ...model.mixtures import Mixture
from ...model.moments import watched, without_padding


@torch.no_grad()
def contributions(model: nn.Module, found: list[Mixture], ctx: Context) -> dict[str, Tensor]:
    """The mean over all tokens of routing weight times the length of the expert's output: [experts] for each layer.

    The saliency of REAP (arXiv:2510.13999), weighted by use: what the layer's output loses, to first order. Padding
    does not count.
    """
    layers = {each.name: each.experts for each in found}
    totals: dict[str, Tensor] = {}
    tokens: dict[str, int] = {}

    def note(name: str, real: Tensor | None) -> Any:
        def hook(given: tuple[Any, ...], _output: Any) -> None:
            experts = layers[name]
            x, indices, weights = (without_padding(each, real) for each in given)
            placed = experts.placed(indices)
            values = []
            for place, member in enumerate(experts.members):
                share = weights.masked_fill(placed != place, 0).sum(1)
                rows = share != 0
                values.append((share[rows] * member(x[rows]).float().norm(dim=1)).sum().double())
            totals[name] = totals.get(name, 0) + torch.stack(values)
            tokens[name] = tokens.get(name, 0) + len(x)

        return hook

    watched(model, layers, ctx, note)
    return {name: total / max(1, tokens[name]) for name, total in totals.items()}


def usage(model: nn.Module, found: list[Mixture], ctx: Context) -> dict[str, Tensor]:
    """How many calibration tokens are sent to each expert: [experts] for each layer."""
    covered = coverage_of(model, ctx)
    return {each.name: covered[each.name].choices.double() for each in found}
