"""Pruning by what the layers get as inputs: Wanda, activation statistics, Optimal Brain Surgeon, SparseGPT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import NotFinite
from ...core.soft import copied
from ...model.moments import Moments, Stage, corrected, gather, observe, stages
from .connections import Connections
from .obs import cheapest, refitted, removals
from .patterns import Pattern, masks
from .saliency import by_input_norm, by_input_size
from .sparsegpt import COLUMNS, inverse_factor, sparsegpt

UPDATING = ("obs", "sparsegpt")  # scores with which the weights that stay make up for those that go
HELD_BYTES = 2**30  # of second moments at a time
Solve = Callable[[Connections, Moments], None]


@dataclass(frozen=True)
class Rule:
    """How one matrix is pruned once the moments of its inputs are known."""

    score: str
    pattern: Pattern
    scope: str
    damping: float

    def __call__(
        self, each: Connections, moments: Moments, weight: Tensor, ctx: Context, sparsity: float
    ) -> tuple[Tensor, Tensor | None]:
        """The mask of a layer at this sparsity, and what its weights become (None: they stay)."""
        moment, allowed = moments.mean(), each.allowed
        parts = list(zip(weight.chunk(len(moment)), allowed.chunk(len(moment)), moment))
        if self.score in UPDATING:
            found = [self._updated(each.name, *part, sparsity, ctx) for part in parts]
            return torch.cat([keep for keep, _ in found]), torch.cat([made for _, made in found])
        assert moments.largeness is not None
        if self.score == "wanda":
            scores = [by_input_norm(part, given) for part, _, given in parts]
        else:
            scores = [by_input_size(part, given) for (part, _, _), given in zip(parts, moments.largeness)]
        score = torch.cat(scores).masked_fill(~allowed, -torch.inf)
        return masks([score], [sparsity], self.pattern, self.scope)[0] & allowed, None

    def _updated(
        self, name: str, weight: Tensor, allowed: Tensor, moment: Tensor, sparsity: float, ctx: Context
    ) -> tuple[Tensor, Tensor]:
        """Mask and weights of rows that get the same inputs; damped until the second moment can be inverted."""
        mean = float(moment.diagonal().mean()) or 1.0  # of a channel that is always 0: then the smallest weights go
        for damping in (self.damping, 10 * self.damping, max(1.0, self.damping)):
            hessian = moment.clone()
            hessian.diagonal().add_(damping * mean)
            factor = inverse_factor(hessian)
            if factor is not None:
                if damping > self.damping:
                    ctx.warn(f"{name}: the moments of its inputs are not positive definite; damped by {damping:g}")
                solved = self._surgeon if self.score == "obs" else self._sparsegpt
                return solved(weight, allowed, hessian if self.score == "obs" else factor, sparsity)
        raise NotFinite(f"calibration: the moments of the inputs of {name!r} cannot be inverted, even when damped")

    def _sparsegpt(self, weight: Tensor, allowed: Tensor, factor: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
        def choose(score: Tensor) -> Tensor:
            return masks([score], [sparsity], self.pattern, self.scope)[0]

        wide = self.pattern.of or self.pattern.block[1]
        made, keep = sparsegpt(weight, factor, choose, allowed, self.pattern.of or wide * max(1, COLUMNS // wide))
        return keep, made

    def _surgeon(self, weight: Tensor, allowed: Tensor, hessian: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
        rows, columns = weight.shape
        group = (self.pattern.kept_at(sparsity), self.pattern.of)
        if group[1]:
            each = columns // group[1] * (group[1] - group[0])
        else:
            each = round(sparsity * columns) if self.scope == "row" else columns
        order, rise = removals(weight, hessian, each, allowed, group)
        total = round(sparsity * rows * columns) if self.scope == "layer" and not group[1] else rows * each
        keep = cheapest(order, rise, columns, total) & allowed
        return keep, refitted(weight, hessian, keep)


def in_order(each: Connections, moments: Moments) -> Moments:
    """The moments with the columns in the order of `Connections.matrix`."""
    order = each.order
    hessian, largeness, drift = moments.hessian, moments.largeness, moments.drift
    return Moments(
        hessian=None if hessian is None else hessian[:, order][:, :, order],
        largeness=None if largeness is None else largeness[:, order],
        drift=None if drift is None else drift[order],
        rows=moments.rows,
        note=moments.note,
    )


def usable(each: Connections, moments: Moments, ctx: Context) -> bool:
    """Whether a layer got inputs to judge by; one that got none is left alone. Raises `NotFinite` for NaN in them."""
    if moments.hessian is None or not bool(moments.hessian.any()):
        ctx.leave(each.name, "its inputs in the calibration data are none or 0; another score may prune it")
        return False
    if not bool(torch.isfinite(moments.hessian).all()):
        raise NotFinite(f"calibration: the inputs of the layer {each.name!r} hold NaN or infinite entries")
    return True


def aim(each: Connections, moments: Moments, damping: float, ctx: Context) -> Tensor:
    """The weight that the pruned one should come near: with a drift, what brings its outputs back to the original's."""
    weight = each.weight
    if moments.note:
        ctx.warn(f"{each.name}: drift is not made up for: {moments.note}")
    if moments.drift is None:
        return weight
    found = corrected(weight, moments, damping)
    if found is None:
        ctx.warn(f"{each.name}: drift is not made up for: its inputs give no finite solution")
        return weight
    return found * each.allowed


def block_by_block(model: nn.Module, ctx: Context, held: Mapping[str, Connections], drift: bool, solve: Solve) -> None:
    """Prune the layers of one block after the other, each with inputs from the blocks pruned before it; then the rest.

    With `drift` the moments say how far outputs are from the original's, and layers of one block see those of it that
    are pruned already. Without, they see the block as it was: scores of inputs that are damaged but not made up for
    prune worse.
    """
    waiting = dict(held)
    for block in ctx.blocks(model):
        prefix = f"{block.name}."
        inside = [name.removeprefix(prefix) for name in waiting if name.startswith(prefix)]
        original = copied(block.module) if inside and drift else None
        found = stages(block, inside) if inside else []
        for stage in found if drift else together(found):
            for name, moments in gather(block, original, stage).items():
                each = waiting.pop(prefix + name)
                solve(each, in_order(each, moments))
    for name in waiting if drift else ():
        ctx.leave(f"{name} (compensate)", "it is in no block, where its drift is not known")
    for some in in_chunks(waiting):
        for name, moments in observe(model, list(some), ctx).items():
            solve(some[name], in_order(some[name], moments))


def together(found: list[Stage]) -> list[Stage]:
    """One stage with the layers of all, whose drift is not asked for."""
    layers = [layer for stage in found for layer in stage.layers]
    return [Stage(layers, dict.fromkeys(layers))] if layers else []


def in_chunks(held: Mapping[str, Connections]) -> Iterator[dict[str, Connections]]:
    """The layers in order, as many at a time as their second moments may be held at once."""
    some: dict[str, Connections] = {}
    size = 0
    for name, each in held.items():
        need = 4 * int(getattr(each.layer, "groups", 1)) * len(each.order) ** 2
        if some and size + need > HELD_BYTES:
            yield some
            some, size = {}, 0
        some[name], size = each, size + need
    if some:
        yield some
