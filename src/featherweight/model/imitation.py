"""Blocks of a changed network, trained to give what the same blocks gave before: distillation block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.context import Context
from ..core.fit import Schedule
from ..core.outputs import first


@dataclass(frozen=True)
class Call:
    """One call of a block, as it was before and after it ran: what it got, and its first output."""

    given: tuple[Any, ...]
    named: Mapping[str, Any]
    output: Tensor


def enclosing(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """For each of these layers the innermost block that holds it: a child, with modules of its own, of a row of several
    (`nn.Sequential`, `nn.ModuleList`). The layer itself where no row holds it.
    """
    blocks = {
        f"{prefix}.{name}" if prefix else name
        for prefix, row in model.named_modules()
        if isinstance(row, nn.Sequential | nn.ModuleList) and len(row._modules) > 1
        for name, child in row.named_children()
        if any(True for _ in child.children())
    }

    def block(name: str) -> str:
        above = name.split(".")
        around = (".".join(above[:depth]) for depth in range(len(above) - 1, 0, -1))
        return next((each for each in around if each in blocks), name)

    return {name: block(name) for name in names}


@contextmanager
def recorded(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, list[Call]]]:
    """Within this block the calls of the named modules are written down, with copies of what they may change."""
    calls: dict[str, list[Call]] = {name: [] for name in names}
    waiting: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def before(name: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        waiting[name] = tuple(map(_own, given)), {key: _own(value) for key, value in named.items()}

    def after(name: str, output: Any) -> None:
        calls[name].append(Call(*waiting.pop(name), first(output).detach().clone()))

    handles = []
    for name in calls:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(
                lambda _m, given, named, name=name: before(name, given, named), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda _m, _given, out, name=name: after(name, out)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def missed(found: Tensor, wanted: Tensor) -> Tensor:
    """The share of the energy of `wanted` that `found`, of its shape, misses: 0 for equal ones, 1 for zeros."""
    return (found.float() - wanted.float()).square().sum() / wanted.float().square().sum().clamp_min(1e-12)


class Imitators(nn.Module):
    """The blocks of a changed network on the inputs that those of the original get; gives the original's output.

    `losses` then holds, for each block, the share of the energy of the original block's output that it misses.
    """

    def __init__(self, changed: nn.Module, original: nn.Module, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self.blocks = nn.ModuleList(changed.get_submodule(name) for name in names)
        self.original = (original,)  # within a tuple it is no module of this one, and not trained
        self.losses: list[Tensor] = []

    def forward(self, *given: Any, **named: Any) -> Any:
        with torch.no_grad(), recorded(self.original[0], self.names) as calls:
            output = self.original[0](*given, **named)
        self.losses = [
            torch.stack([missed(first(block(*call.given, **call.named)), call.output) for call in calls[name]]).mean()
            for name, block in zip(self.names, self.blocks)
            if calls[name]
        ]
        return output


def imitate(
    model: nn.Module, original: nn.Module, names: Sequence[str], ctx: Context, training: Schedule, text: str
) -> None:
    """Train the named blocks of `model`, in place and all at once, to give what those of `original` give for the same
    inputs: each learns for itself, so that no gradient passes through more than one.

    Parallel blockwise distillation: arXiv:2012.03096; blocks taught one by one: arXiv:1911.13053. Needs training data,
    no labels.
    """
    blocks = Imitators(model, original.to(ctx.device).eval(), names)
    ctx.fit(blocks, training, lambda made, *_: torch.stack(made.losses).sum(), text=text)


@torch.no_grad()
def block_errors(model: nn.Module, original: nn.Module, names: Sequence[str], ctx: Context) -> dict[str, float]:
    """The share of the energy of the outputs of each named block of `original` that `model`'s misses for the same
    inputs; mean over the calibration batches.
    """
    blocks = Imitators(model.to(ctx.device), original.to(ctx.device).eval(), names).eval()
    found: list[Tensor] = []
    for batch in ctx.progress.track(ctx.batches("calibrate"), "comparing blocks"):
        ctx.task.call(blocks, batch)
        found.append(torch.stack(blocks.losses))
    return dict(zip(names, torch.stack(found).mean(0).tolist()))
