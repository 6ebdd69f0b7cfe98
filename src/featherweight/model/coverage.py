"""Who was routed where: how many tokens each expert of a model gets, by what weight, and how many are dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..core.errors import TaskError
from ..core.soft import copied
from ..core.task import Split, Task
from .dispatch import dispatch
from .experts import Experts
from .mixtures import mixtures
from .moments import watched, without_padding


@dataclass
class Coverage:
    """What the experts of one layer got: `choices` and summed `weights` per expert, `dropped` choices, all `tokens`.

    Padding counts nowhere.
    """

    choices: Tensor
    weights: Tensor
    dropped: Tensor
    tokens: int = 0

    @property
    def unused(self) -> list[int]:
        """The experts that no token was sent to."""
        return [place for place, count in enumerate(self.choices.tolist()) if not count]

    @property
    def shares(self) -> list[float]:
        """Each expert's share of all weights."""
        return (self.weights / self.weights.sum().clamp_min(1e-12)).tolist()

    def __str__(self) -> str:
        counts = ", ".join(f"{int(count):,}" for count in self.choices)
        shares = ", ".join(f"{share:.0%}" for share in self.shares)
        none = f"; none to {', '.join(map(str, self.unused))}" if self.unused else ""
        dropped = int(self.dropped.sum())
        lost = f"; {dropped:,} dropped" if dropped else ""
        return f"{self.tokens:,} tokens, to each expert {counts} (share of weight {shares}){none}{lost}"


def count(experts: Experts, indices: Tensor, weights: Tensor, real: Tensor | None = None) -> Coverage:
    """The coverage of one call; choices beyond the capacity count as dropped. `real` says which tokens are no padding,
    which takes room in the experts all the same.
    """
    members, placed = len(experts.members), experts.placed(indices)
    found = dispatch(placed, members, experts.capacity)
    gone = (found.places == len(found.tokens)).t()
    placed, weights, gone = (without_padding(each, real) for each in (placed, weights, gone))
    flat = placed.flatten()
    choices = torch.bincount(flat, minlength=members)
    summed = torch.zeros(members, dtype=torch.float64).index_add(0, flat.cpu(), weights.flatten().double().cpu())
    dropped = torch.bincount(placed[gone], minlength=members)
    return Coverage(choices.cpu(), summed, dropped.cpu(), len(placed))


@torch.no_grad()
def coverage_of(model: nn.Module, ctx: Context, split: Split = "calibrate") -> dict[str, Coverage]:
    """The coverage of every layer of experts over a split, by the name of the layer."""
    found: dict[str, Coverage] = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}

    def note(name: str, real: Tensor | None) -> Any:
        def hook(given: tuple[Any, ...], _output: Any) -> None:
            one, before = count(layers[name], given[1], given[2], real), found.get(name)
            if before is not None:
                one.choices, one.weights = one.choices + before.choices, one.weights + before.weights
                one.dropped, one.tokens = one.dropped + before.dropped, one.tokens + before.tokens
            found[name] = one

        return hook

    if layers:
        watched(model, layers, ctx, note, split)
    return found


def coverage(model: nn.Module, task: Task, split: Split = "calibrate") -> dict[str, Coverage]:
    """Who is routed where when `model` runs over a split of `task`, by the name of each layer of experts.

    Experts in stacks of weights are opened for it, in a copy. Raises `TaskError` for a model without experts.
    """
    ctx = Context(task)
    made = copied(model).to(ctx.device).eval()
    mixtures(made, ctx)
    found = coverage_of(made, ctx, split)
    if not found:
        raise TaskError("the model has no layer of experts that could be recognised, so nothing is routed in it")
    return found


def tell(model: nn.Module, ctx: Context) -> None:
    """Record for every layer of experts who was routed where in calibration, and who only saw tokens of others."""
    for name, each in coverage_of(model, ctx).items():
        ctx.change(f"{name} (coverage)", str(each))
        if each.unused:
            numbers = ", ".join(map(str, each.unused))
            ctx.warn(f"{name}: no calibration token is sent to expert {numbers}; calibrated on all tokens instead")
