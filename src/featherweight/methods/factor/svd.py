"""factor.svd: two thin layers in place of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.context import Context
from ...core.fit import missed_variance
from ...core.knapsack import choose
from ...core.outputs import first
from ...core.step import OneOf, Place
from ...model.factored import Factored
from ...model.matrices import Matrix
from ...model.moments import observe
from ...model.replacing import Convolution, Made, filled, pointwise, rounded, shown, with_kernel
from .factoring import Factoring
from .matrices import Decomposition, cost, decompose, largest_rank

OPTIONS = 48  # ranks of a layer that are weighed against those of others
LEVELS = (0.1, 0.25, 0.5, 0.8)  # of a layer's largest rank: where the change of the outputs is measured
AT_ONCE = 2**28  # entries of second moments that are held at once


@dataclass(frozen=True)
class Ranked:
    """One layer, its decomposition, and the ranks that it may have; 0 leaves it as it is."""

    matrix: Matrix
    found: Decomposition
    ranks: list[int]

    @property
    def whole(self) -> int:
        return self.matrix.parameter().numel()

    def parameters(self, rank: int) -> int:
        return cost(*_sizes(self.matrix), rank) if rank else self.whole

    def missed(self, rank: int) -> float:
        return self.found.missed(rank) if rank else 0.0


class SingularValues(Factoring, kind="factor.svd"):
    """Put two thin layers in place of each linear layer and convolution, by singular value decomposition.

    With `whiten` the factors are those of least error of the layer's outputs over the calibration data; without, of
    least error of its weight. A convolution becomes one with fewer outputs and one with a kernel of one; a table
    (`embeddings`) a narrower one and a linear layer. `allocation` "energy" gives each layer the rank at which the
    shares of energy that all miss add up to least within `keep`; "sensitivity" weighs a layer by what the model's
    outputs (all held in memory) change by when it alone is factored; "layer" gives each the same share. Ranks are
    multiples of `multiple` (default: what the target likes). `damping`: see `decompose`. A budget that even the
    smallest ranks exceed is a warning. With `retrain` the network is then trained.
    """

    place: ClassVar[Place | None] = Place.RESHAPE
    paper: ClassVar[str] = "arXiv:2403.07378, NeurIPS 2021 (DRONE)"

    whiten: bool = True
    allocation: Annotated[Literal["layer", "energy", "sensitivity"], OneOf("layer", "energy")] = "energy"
    multiple: Annotated[int, Field(ge=1)] | None = None
    damping: Annotated[float, Field(gt=0)] = 1e-4
    embeddings: bool = False

    def obstacle(self, matrix: Matrix) -> str:
        if matrix.transposed:
            return "is a transposed or three-dimensional convolution, for which there are no two thin ones here"
        if getattr(matrix.layer, "groups", 1) > 1:
            return "has groups of channels, which are thin already"
        outputs, columns = _sizes(matrix)
        if largest_rank(outputs, columns, outputs * columns - 1) < 1:
            return f"no rank has fewer parameters than its {outputs} x {columns}"
        return ""

    def made(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterator[tuple[str, Made]]:
        ranked = dict(self._ranked(found, model, ctx))
        ranks = self._allocated(ranked, model, ctx)
        for name, each in ranked.items():
            if rank := ranks[name]:
                how = f"rank {rank}: {shown(each.parameters(rank), each.whole, each.missed(rank))}"
                yield name, Made(thin(each.matrix, *each.found.factors(rank)), how)
            else:
                ctx.leave(name, "its parameters are worth more where they are than in other layers")

    def _ranked(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterator[tuple[str, Ranked]]:
        for some in _in_chunks(found):
            moments = observe(model, [name for name in some if not found[name].lookup], ctx) if self.whiten else {}
            for name in some:
                each, seen = found[name], moments.get(name)
                hessian = None if seen is None else seen.mean()[0]
                yield name, Ranked(each, decompose(each.weight(), hessian, self.damping), self._ranks(each, ctx))

    def _ranks(self, matrix: Matrix, ctx: Context) -> list[int]:
        outputs, columns = _sizes(matrix)
        most = largest_rank(outputs, columns, outputs * columns - 1)
        multiple = self.multiple or ctx.width_multiple
        return [0, *sorted({rounded(int(each), multiple) for each in np.linspace(1, most, OPTIONS)})]

    def _allocated(self, ranked: dict[str, Ranked], model: nn.Module, ctx: Context) -> dict[str, int]:
        if not ranked:
            return {}
        if self.allocation == "layer":
            ranks = {name: self._share(each) for name, each in ranked.items()}
            for name, each in ranked.items():
                if each.parameters(ranks[name]) > self.keep * each.whole:
                    ctx.warn(f"{name}: its smallest rank has more parameters than keep={self.keep}")
            return ranks
        budget = self.keep * sum(each.whole for each in ranked.values())
        costs = [[float(each.parameters(rank)) for rank in each.ranks] for each in ranked.values()]
        if self.allocation == "sensitivity":
            losses = self._changes(ranked, model, ctx)
            costs = [[c if np.isfinite(x) else np.inf for c, x in zip(*each)] for each in zip(costs, losses)]
        else:
            losses = [[each.missed(rank) for rank in each.ranks] for each in ranked.values()]
        least = sum(min(each) for each in costs)
        if least > budget:
            ctx.warn(
                f"the smallest ranks have {least:,.0f} parameters, more than keep={self.keep} allows: {budget:,.0f}"
            )
        places = choose(costs, losses, max(budget, least * 1.01)).options(max(budget, least * 1.01))
        return {name: each.ranks[place] for (name, each), place in zip(ranked.items(), places)}

    def _share(self, each: Ranked) -> int:
        """The largest rank within this layer's own share; the smallest if there is none."""
        return max((r for r in each.ranks if r and each.parameters(r) <= self.keep * each.whole), default=each.ranks[1])

    @torch.no_grad()
    def _changes(self, ranked: dict[str, Ranked], model: nn.Module, ctx: Context) -> list[list[float]]:
        """What the model's outputs change by when one layer alone has each of its ranks: measured at some, on straight
        lines between them; a rank below all that were measured is not to be had.
        """
        found, wanted = [], _outputs(model, ctx)
        for each in ctx.progress.track(ranked.values(), "what factoring each layer alone changes", len(ranked)):
            most, weight, axis = each.ranks[-1], each.matrix.parameter(), each.matrix.axis
            kept, tried = weight.clone(), sorted({max(1, round(level * most)) for level in LEVELS})
            changes = []
            for rank in tried:
                left, right = each.found.factors(rank)
                weight.copy_((left @ right).reshape(weight.movedim(axis, 0).shape).movedim(0, axis))
                changes.append(float(missed_variance(_outputs(model, ctx), wanted)))
            weight.copy_(kept)
            falling = np.maximum.accumulate(changes[::-1])[::-1]
            curve = np.interp(each.ranks, tried, falling, left=np.inf)
            found.append([0.0, *curve[1:].tolist()])
        return found


def thin(matrix: Matrix, left: Tensor, right: Tensor) -> Factored:
    """The two layers with these factors: [outputs, rank] and [rank, columns]."""
    layer, rank = matrix.layer, left.shape[1]
    bias = getattr(layer, "bias", None)
    if isinstance(layer, nn.Embedding):
        table = filled(nn.Embedding(len(left), rank, padding_idx=layer.padding_idx), left)
        return Factored(table, filled(nn.Linear(rank, right.shape[1], bias=False), right.T))
    if isinstance(layer, Convolution):
        first = with_kernel(layer, layer.in_channels, rank)
        return Factored(filled(first, right), filled(pointwise(layer, rank, len(left), bias is not None), left, bias))
    return Factored(
        filled(nn.Linear(right.shape[1], rank, bias=False), right),
        filled(nn.Linear(rank, len(left), bias=bias is not None), left, bias),
    )


def _outputs(model: nn.Module, ctx: Context) -> Tensor:
    """The model's first output on the calibration data, flat."""
    return torch.cat([first(ctx.task.call(model, batch)).float().flatten() for batch in ctx.batches("calibrate")])


def _sizes(matrix: Matrix) -> tuple[int, int]:
    """Outputs and columns."""
    return matrix.parameter().shape[matrix.axis], matrix.columns


def _in_chunks(found: dict[str, Matrix]) -> Iterator[list[str]]:
    """Names of layers whose second moments are held at once."""
    some: list[str] = []
    held = 0
    for name, each in found.items():
        size = 0 if each.lookup else each.columns**2
        if some and held + size > AT_ONCE:
            yield some
            some, held = [], 0
        some.append(name)
        held += size
    if some:
        yield some
