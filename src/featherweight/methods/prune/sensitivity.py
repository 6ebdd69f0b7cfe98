"""What pruning each layer alone costs the whole network: the rise of the task's loss over the calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from ...core.context import Context
from ...core.evaluate import calibration_loss
from .allocation import allocate, levels
from .connections import Connections

Pruned = Callable[[float], tuple[Tensor, Tensor | None]]  # sparsity -> mask and weights of one layer


def by_sensitivity(
    model: nn.Module,
    ctx: Context,
    held: Mapping[str, Connections],
    alone: Iterator[tuple[str, Pruned]],
    sparsity: float,
    least: float,
) -> dict[str, float]:
    """The sparsity of each layer, `sparsity` in all, for which the losses measured with one layer pruned add up to
    least.

    `alone` gives for each layer what prunes it; each is tried at a few sparsities and put back.
    """
    losses: dict[str, dict[float, float]] = {}
    before = calibration_loss(model, ctx)
    for name, pruned in ctx.progress.track(alone, "what pruning each layer alone costs", len(held)):
        each, state = held[name], held[name].state
        losses[name] = {}
        for share in levels(sparsity, each.zeros, least):
            each.put(*pruned(share))
            losses[name][share] = calibration_loss(model, ctx) - before
            each.put(*state)
    known = {name: each for name, each in held.items() if name in losses}
    counts = {name: each.mask.keep.numel() for name, each in known.items()}
    return allocate(losses, counts, sparsity, {name: each.zeros for name, each in known.items()})
