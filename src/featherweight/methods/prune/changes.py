"""What the task's loss changes by, to first order, when the units of a group are taken away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.data import to_device
from ...core.errors import TaskError
from ...model.groups import Coupling, Group, tensors
from .scores import group_fisher, slices, taylor

FirstOrder = Literal["taylor", "fisher"]


def loss_changes(
    model: nn.Module, ctx: Context, coupling: Coupling, groups: Mapping[int, Group], score: FirstOrder
) -> dict[int, Tensor]:
    """One score per unit of each group, from the gradients on the calibration data.

    "taylor" is the mean over batches of the squared change, summed over the coupled parameters; "fisher" the mean over
    single inputs of the square of the change summed over them (over batches, where the data come in batches). Raises
    `TaskError` if there are no labels or no data.
    """
    held = {name: tensor for name, tensor in tensors(model).items() if name in coupling.parameters}
    found = {place: torch.zeros(len(group), device=ctx.device) for place, group in groups.items()}
    trainable = {name: tensor.requires_grad for name, tensor in held.items()}
    for tensor in held.values():
        tensor.requires_grad_(tensor.is_floating_point())
    count = 0
    model.eval()
    for batch in ctx.progress.track(_batches(ctx, score), "scoring"):
        model.zero_grad(set_to_none=True)
        _loss(model, ctx, batch, score).backward()
        count += 1
        for place, group in groups.items():
            parts = list(_slices(group, held))
            if parts:
                found[place] += _squared(parts, score)
    model.zero_grad(set_to_none=True)
    for name, tensor in held.items():
        tensor.requires_grad_(trainable[name])
    if not count:
        raise TaskError(f"task {ctx.task.name}: the 'calibrate' data gave no batch, which score={score} needs")
    return {place: total / count for place, total in found.items()}


def _batches(ctx: Context, score: FirstOrder) -> Iterator[Any]:
    for batch in ctx.task.batches("calibrate", batch_size=1 if score == "fisher" else None):
        yield to_device(batch, ctx.device)


def _slices(group: Group, held: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights and gradients of the group's units in each coupled parameter that has a gradient: units x entries."""
    for (name, dim), positions in group.places.items():
        gradient = held[name].grad if name in held else None
        if gradient is not None:
            index = torch.as_tensor(positions, device=gradient.device)
            yield slices(held[name].detach(), dim, index), slices(gradient, dim, index)


def _squared(parts: list[tuple[Tensor, Tensor]], score: FirstOrder) -> Tensor:
    if score == "fisher":
        return group_fisher(parts)
    return torch.stack([taylor(weights, gradients) for weights, gradients in parts]).sum(0)


def _loss(model: nn.Module, ctx: Context, batch: Any, score: FirstOrder) -> Tensor:
    output = ctx.task.call(model, batch)
    try:
        return ctx.task.loss(output, batch)
    except TaskError as error:
        raise TaskError(
            f"prune.structured with score={score} needs labels in the calibration split: {error}; or use score=l2"
        ) from error
