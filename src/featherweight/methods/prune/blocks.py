"""Pruning of depth: whole residual blocks and layers of a transformer are taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from ...core.context import Context
from ...core.errors import NoEffect, TaskError
from ...core.fit import Term, Training, task_loss, towards
from ...core.step import Between, OneOf, Trait
from ...model.blocks import Example, find_blocks, input_shapes, outputs_of, remove_blocks, silenced, without
from ...model.cost import forward_macs
from ...model.cut import shell
from ...model.recalibrate import recalibrate
from ...model.select import LayerStep, excluded, unused
from .depth import give_back, rank
from .layers import layers

Costs = Callable[[Sequence[nn.Module]], list[float]]

SHORT = 0.02  # how far from the asked share a result may end without a warning


class BlockPrune(LayerStep, kind="prune.blocks"):
    """Take away the residual blocks, or layers of a transformer, that the network misses least.

    A block is a child of an `nn.Sequential` or `nn.ModuleList` that gives back the form of its first input, and whose
    removal was checked to be the same as handing that input on; every other child is named with the reason. `keep` is
    the share that is kept of the multiply-accumulates, of the parameters, or of the seconds that one input takes on
    the target (`of`). What a block is worth is measured: by how much the mean of the task's loss over the calibration
    split (`score` "loss"), or the distance of the outputs from the original's ("outputs", which needs no labels),
    grows when the block is silenced, over what its removal saves. In each of `rounds` the blocks are measured anew
    and an equal part of what must go is taken away; then batch norms get new statistics (`recalibrate`) and, with
    `retrain`, the network is trained. `min_blocks` of those that could go stay. `only` and `skip` choose blocks.

    Removing layers by what they change: arXiv:2403.03853; by dropping and measuring: arXiv:1909.11556. Raises
    `NoEffect` if there is no block to take away, `TaskError` if "loss" finds no labels or "latency" no target.
    """

    needs = Trait.EDITABLE | Trait.RESHAPABLE
    paper = "arXiv:2403.03853"

    keep: Annotated[float, Field(gt=0, lt=1), Between(0.4, 0.95)] = 0.7
    of: Literal["macs", "parameters", "latency"] = "macs"
    score: Annotated[Literal["loss", "outputs"], OneOf("loss", "outputs")] = "loss"
    rounds: Annotated[int, Field(ge=1, le=100)] = 4
    min_blocks: Annotated[int, Field(ge=0)] = 1
    recalibrate: bool = True
    retrain: Training | None = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        model.eval()
        for glob in unused(model, (nn.Module,), self.only, self.skip):
            ctx.warn(f"{self.kind}: no layer matches {glob!r}")
        names = {module: name for name, module in model.named_modules()}
        inside = [layer.name for layer in layers(model)]
        found = find_blocks(model, ctx.example)
        left = found.left | {name: why for name in found.blocks if (why := excluded(name, self.only, self.skip))}
        open_ = [model.get_submodule(name) for name in found.blocks if name not in left]
        if not open_:
            raise NoEffect(f"{self.kind} finds no block to take away: {_some(left)}")
        costs, reached = self._gauge(model, ctx), 1.0
        spare = len(open_) - self.min_blocks
        for turn in range(1, self.rounds + 1):
            ctx.progress.say(f"{self.kind}: round {turn} of {self.rounds}")
            share = self.keep ** (turn / self.rounds)
            gone = self._round(model, ctx, costs, open_, spare, share)
            spare, open_ = spare - len(gone), [block for block in open_ if block not in gone]
            for block in gone:
                ctx.change(names[block], "taken away")
            reached = costs([model])[0] if gone else reached
            self._heal(model, ctx, turn, bool(gone))
        self._report(ctx, inside, left | {names[block]: "the network would miss it more" for block in open_})
        if reached - self.keep > SHORT:
            ctx.warn(f"{self.kind} kept {reached:.1%} of the {self.of}, not {self.keep:.1%}")
        return model.eval()

    def _report(self, ctx: Context, inside: list[str], left: dict[str, str]) -> None:
        """Every block that stays and why, and what became of every layer."""
        gone = list(ctx.record.changed)
        for name, reason in left.items():
            ctx.leave(name, reason)
        for layer in inside:
            if owner := _owner(layer, gone):
                ctx.change(layer, f"taken away with {owner}")
            elif why := excluded(layer, self.only, self.skip):
                ctx.leave(layer, why)
            elif owner := _owner(layer, left):
                ctx.leave(layer, f"it stays with {owner}: {left[owner]}")
            else:
                ctx.leave(layer, "it is in no block that could be taken away")

    def _heal(self, model: nn.Module, ctx: Context, turn: int, changed: bool) -> None:
        if changed and self.recalibrate:
            recalibrate(model, ctx)
        if changed and self.retrain is not None:
            ctx.fit(model, self.retrain, text=f"retraining after round {turn} of {self.kind}")

    def _round(
        self, model: nn.Module, ctx: Context, costs: Costs, open_: list[nn.Module], spare: int, target: float
    ) -> list[nn.Module]:
        """Take away at most `spare` of the blocks in `open_`, so that the cost comes down to `target`; return them."""
        names = {module: name for name, module in model.named_modules()}
        blocks = {names[block]: block for block in open_}
        cost, saved = savings(model, costs, list(blocks), ctx.example)
        if cost <= target or spare < 1:
            return []
        losses = losses_without(model, ctx, list(blocks), self._term(ctx))
        order = rank({name: losses[name] - losses[""] for name in blocks}, saved)[:spare]
        chosen = give_back(order, saved, cost - target)
        remove_blocks(model, chosen)
        return [blocks[name] for name in chosen]

    def _term(self, ctx: Context) -> Term:
        return task_loss if self.score == "loss" else towards(1.0)

    def _gauge(self, model: nn.Module, ctx: Context) -> Costs:
        """What models cost, as shares of what `model` costs as it is now."""
        start = shell(model)

        def costs(models: Sequence[nn.Module]) -> list[float]:
            every = [start, *models]
            if self.of == "latency":
                found = ctx.seconds(every)
            elif self.of == "macs":
                found = [forward_macs(each, ctx.example) for each in every]
            else:
                found = [float(sum(parameter.numel() for parameter in each.parameters())) for each in every]
            return [each / found[0] for each in found[1:]]

        return costs


def savings(model: nn.Module, costs: Costs, names: list[str], example: Example) -> tuple[float, dict[str, float]]:
    """What the model costs, and what each block's removal saves; blocks that look alike, and get inputs of one shape,
    are measured once.
    """
    shapes = input_shapes(model, names, example)
    alike = {name: f"{shapes[name]}\n{_looks(model.get_submodule(name))}" for name in names}
    firsts = {look: name for name, look in reversed(alike.items())}
    whole, *rest = costs([model, *(without(model, [name]) for name in firsts.values())])
    saved = {look: whole - cost for look, cost in zip(firsts, rest)}
    return whole, {name: saved[look] for name, look in alike.items()}


def _owner(layer: str, blocks: Iterable[str]) -> str:
    """The block that holds `layer`; empty if none does."""
    return next((name for name in blocks if layer.startswith(f"{name}.")), "")


def _looks(block: nn.Module) -> str:
    """Types, settings and shapes of all that a block holds."""
    kinds = [f"{name}:{type(module).__name__}:{module.extra_repr()}" for name, module in block.named_modules()]
    shapes = [f"{name}:{tuple(tensor.shape)}" for name, tensor in block.state_dict().items()]
    return "\n".join(kinds + shapes)


def _some(left: Mapping[str, str]) -> str:
    reasons = "; ".join(f"{name}: {reason}" for name, reason in list(left.items())[:3])
    return reasons or "no nn.Sequential or nn.ModuleList of the model holds several modules"


@torch.no_grad()
def losses_without(model: nn.Module, ctx: Context, names: Sequence[str], term: Term) -> dict[str, float]:
    """Mean loss over the calibration split with each of these blocks silenced, and, under "", with none.

    What computes before the block that is silenced is not computed again for each.
    """
    totals, count = dict.fromkeys(["", *names], 0.0), 0
    for batch in ctx.progress.track(ctx.batches("calibrate"), "measuring blocks"):
        size = ctx.task.count(batch)
        count += size
        with outputs_of(model, names) as known:
            totals[""] += size * float(_loss(model, ctx, batch, term))
        order = list(known)
        for place, name in enumerate(order):
            with silenced(model, [name], {other: known[other] for other in order[: place + 1]}):
                totals[name] += size * float(_loss(model, ctx, batch, term))
    if not count:
        raise TaskError(f"task {ctx.task.name}: the 'calibrate' data gave no batch, which prune.blocks needs")
    return {name: total / count for name, total in totals.items()}


def _loss(model: nn.Module, ctx: Context, batch: Any, term: Term) -> torch.Tensor:
    output = ctx.task.call(model, batch)
    try:
        return term(model, batch, output, ctx)
    except TaskError as error:
        raise TaskError(
            f"prune.blocks with score=loss needs labels in the calibration split: {error}; or use score=outputs"
        ) from error
