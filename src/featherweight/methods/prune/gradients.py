"""Gradients of the loss in single weights, over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.data import to_device
from ...core.errors import NotFinite
from .connections import Connections
from .saliency import brain_damage, first_order

Scores = dict[str, Tensor]


def first_order_scores(model: nn.Module, ctx: Context, held: Mapping[str, Connections]) -> Scores:
    """The squared first-order change of the loss for each weight, the mean over batches of the calibration data."""
    return _mean_scores(model, ctx, held, None, lambda weight, gradient, _count: first_order(weight, gradient))


def fisher_scores(model: nn.Module, ctx: Context, held: Mapping[str, Connections]) -> Scores:
    """Optimal Brain Damage with the diagonal of the empirical Fisher information: the mean squared gradient of inputs.

    Inputs are taken one at a time. Where the data come in batches of their own, n inputs stand for one whose squared
    gradient is n times that of their mean, which is right where gradients of different inputs are independent.
    """
    return _mean_scores(
        model, ctx, held, 1, lambda weight, gradient, count: brain_damage(weight, count * gradient.square())
    )


def _mean_scores(
    model: nn.Module,
    ctx: Context,
    held: Mapping[str, Connections],
    size: int | None,
    score: Callable[[Tensor, Tensor, int], Tensor],
) -> Scores:
    """The mean of `score(weight, gradient of the loss, inputs)` over batches of `size` inputs, as matrices."""
    totals, batches = {name: torch.zeros_like(each.weight) for name, each in held.items()}, 0
    weights = {name: each.weight for name, each in held.items()}
    parameters = [each.parameter for each in held.values()]
    trained = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        model.to(ctx.device).eval()
        for batch in ctx.progress.track(ctx.task.batches("calibrate", size), "observing gradients"):
            batch = to_device(batch, ctx.device)
            with torch.enable_grad():
                loss = ctx.task.loss(ctx.task.call(model, batch), batch)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for (name, each), gradient in zip(held.items(), gradients):
                if gradient is not None:
                    totals[name] += score(weights[name], each.matrix(gradient).float(), ctx.task.count(batch))
            batches += 1
    finally:
        for parameter, was in zip(parameters, trained):
            parameter.requires_grad_(was)
    for name, total in totals.items():
        if not torch.isfinite(total).all():
            raise NotFinite(f"calibration: gradients in the weight of {name!r} are NaN or infinite")
    return {name: total / max(1, batches) for name, total in totals.items()}
