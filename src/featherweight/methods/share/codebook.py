"""share.codebook: weights become indices into a small table that many of them share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.core.additive import summed
from featherweight.core.context import Context
from featherweight.core.errors import NotFinite
from featherweight.core.fit import Training
from featherweight.core.step import OneOf, Place, Trait
from featherweight.model.held import HeldIndices, HeldSums
from featherweight.model.matrices import Matrix, chosen_matrices, put
from featherweight.model.moments import observe
from featherweight.model.select import LayerStep

from .clusters import density_start, k_means, linear_start, plus_plus_start
from .residual import assign, find_tables

DRAWN = 2**18  # weights on which a table for a large layer is found
SWEEPS = 10  # how often each of several tables is found anew for what the others leave


class CodebookSharing(LayerStep, kind="share.codebook"):
    """Let the weights of linear layers and convolutions share the entries of a small table, found by k-means.

    Each weight becomes an index of `bits` bits; with `length` above 1 one index stands for so many neighbours of a row
    (product quantization). A table belongs to a layer, or with `scope` "model" to all of them, each with a scale of its
    own. With `codebooks` above 1 it is the sum of one entry of each of so many tables, `bits` bits each, every table
    found on what the others leave (residual quantization). `start` places the first entries: evenly over the range, by
    density, or drawn by distance (k-means++). With `importance` "inputs" errors count by the mean square of what the
    weight is multiplied with over the calibration data. Weights that are pruned stay 0, which takes one entry. With
    `retrain` the tables are then trained through the assignment (the gradients of all weights of an entry are summed)
    with scales, biases and norms; they stay trainable.
    Raises `NotFinite` if calibration meets NaN.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset(f"codebook{bits}" for bits in range(1, 9))
    place: ClassVar[Place | None] = None  # on request: for size alone the search has quantize.weights
    gains: ClassVar[frozenset[str]] = frozenset({"size"})
    paper: ClassVar[str] = "arXiv:1510.00149, arXiv:2401.06118"

    bits: Annotated[int, Field(ge=1, le=8), OneOf(5, 4, 3)] = 4
    length: Annotated[int, Field(ge=1, le=16)] = 1
    codebooks: Annotated[int, Field(ge=1, le=8)] = 1
    scope: Literal["layer", "model"] = "layer"
    start: Literal["linear", "density", "k-means++"] = "density"
    importance: Literal["none", "inputs"] = "inputs"
    iterations: Annotated[int, Field(ge=0)] = 50
    retrain: Training | None = None

    def forms(self) -> frozenset[str]:
        several = f"additive{self.codebooks}x{self.bits}"
        return frozenset({f"codebook{self.bits}" if self.codebooks == 1 else several})

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        chosen = []
        for matrix in chosen_matrices(self, model, ctx):
            if reason := self._obstacle(matrix):
                ctx.leave(matrix.name, reason)
            else:
                chosen.append(matrix)
        importance = self._importance(model, chosen, ctx)
        for together in [chosen] if self.scope == "model" and chosen else [[matrix] for matrix in chosen]:
            self._share(together, importance, ctx)
        if self.retrain is not None and chosen:
            loss = ctx.fit(model, self.retrain, text="training codebooks")
            ctx.change("*", f"tables trained for {self.retrain.epochs:g} epochs, last loss {loss:.4g}")
        return model

    def _obstacle(self, matrix: Matrix) -> str:
        """Why a layer cannot share; empty if it can."""
        if matrix.columns % self.length:
            return f"length={self.length} does not divide its {matrix.columns} inputs"
        if matrix.axis and self.length > 1:
            return "its outputs are not the first dimension of its weight: only single weights share"
        if matrix.keep is not None and not bool(matrix.keep.any()):
            return "all of its weights are pruned"
        if matrix.keep is not None and (self.length > 1 or self.codebooks > 1):
            return "it is pruned, and vectors and sums hold single zeros no longer; use length 1 and one codebook"
        if matrix.parameter().numel() // self.length < 2**self.bits:
            return f"it has no more weights than a table of {self.bits} bits has entries"
        return ""

    def _importance(self, model: nn.Module, chosen: list[Matrix], ctx: Context) -> dict[str, Tensor]:
        """The mean square of each input of each layer, [columns], for the layers that could be observed."""
        names = [matrix.name for matrix in chosen if not matrix.lookup and not matrix.transposed]
        if self.importance == "none" or not names:
            return {}
        found = {}
        for name, each in observe(model, names, ctx).items():
            if each.hessian is None:
                ctx.warn(f"{name}: calibration does not reach it; all of its weights count alike")
                continue
            mean = each.mean().diagonal(dim1=1, dim2=2)
            if not bool(torch.isfinite(mean).all()):
                raise NotFinite(f"{self.kind}: the inputs of {name} hold NaN or infinite values in calibration")
            found[name] = mean
        return found

    @torch.no_grad()
    def _share(self, matrices: list[Matrix], importance: dict[str, Tensor], ctx: Context) -> None:
        """Find one table for these matrices, and put the indices in place of their weights."""
        weights = [matrix.weight().cpu() for matrix in matrices]  # clusters are found on the CPU, wherever the model is
        alone = torch.ones(())
        scales = [root_mean_square(weight) if self.scope == "model" else alone for weight in weights]
        points = [(weight / scale).reshape(-1, self.length) for weight, scale in zip(weights, scales)]
        masses = [
            _mass(matrix, importance.get(matrix.name), self.length) * scale**2
            for matrix, scale in zip(matrices, scales)
        ]
        pruned = any(matrix.keep is not None for matrix in matrices)
        tables = self._tables(torch.cat(points), torch.cat(masses), pruned, ctx)
        first: HeldIndices | HeldSums | None = None
        for matrix, scale, own, mass in zip(matrices, scales, points, masses):
            indices = assign(own, tables, SWEEPS)
            if matrix.keep is not None:
                indices = torch.where(matrix.keep.cpu().flatten(), indices, 0)
            total = float((own.square().sum(1) * mass).sum())
            missed = float(((own - summed(tables, indices)).square().sum(1) * mass).sum())
            link = _link(matrix, indices, tables, scale, self.length, int(pruned)).to(matrix.parameter().device)
            if first is not None:
                link.table = first.table
            first = first or link
            put(matrix, link)
            ctx.change(matrix.name, f"{matrix.form()}, {100 * missed / total if total else 0:.2g}% weighted error")

    def _tables(self, points: Tensor, mass: Tensor, pruned: bool, ctx: Context) -> Tensor:
        """Tables of little weighted error, [codebooks, entries, length]; of pruned weights the first entry is 0."""
        generator, entries = ctx.generator(self.kind), 2**self.bits - int(pruned)
        points, mass = points[mass > 0], mass[mass > 0]
        if len(points) > DRAWN:
            drawn = torch.randperm(len(points), generator=generator)[:DRAWN]
            points, mass = points[drawn], mass[drawn]

        def start(points: Tensor, mass: Tensor) -> Tensor:
            if self.start == "k-means++":
                return plus_plus_start(points, entries, generator, mass)
            return linear_start(points, entries) if self.start == "linear" else density_start(points, entries, mass)

        if pruned:
            table = torch.cat([points.new_zeros(1, points.shape[1]), start(points, mass)])
            tables = k_means(points, table, mass, self.iterations, held=1)[0][None]
        else:
            tables = find_tables(points, mass, self.codebooks, start, self.iterations, SWEEPS)
        return tables.half().float()


def root_mean_square(weight: Tensor) -> Tensor:
    """The size of the weights of a layer, a scalar above 0."""
    return weight.square().mean().sqrt().clamp_min(1e-12)


def _mass(matrix: Matrix, importance: Tensor | None, length: int) -> Tensor:
    """What each weight (or vector of `length`) counts, [n]; pruned ones nothing."""
    rows = matrix.weight().shape[0]
    if importance is None:
        mass = torch.ones(rows, matrix.columns)
    else:
        mass = (
            importance.cpu()
            .clamp_min(1e-6 * float(importance.mean()) + 1e-30)
            .repeat_interleave(rows // len(importance), 0)
        )
    if matrix.keep is not None:
        mass = mass * matrix.keep.cpu()
    return mass.reshape(-1, length).mean(1)


def _link(
    matrix: Matrix, indices: Tensor, tables: Tensor, scale: Tensor, length: int, fixed: int
) -> HeldIndices | HeldSums:
    """What holds the weight: `indices` [books, vectors] of rows of the matrix, laid out as the weight is."""
    weight = matrix.parameter()
    moved = [weight.shape[matrix.axis], *(size for dim, size in enumerate(weight.shape) if dim != matrix.axis)]
    dtype, size = str(weight.dtype).removeprefix("torch."), list(weight.shape)
    laid = indices.to(torch.uint8)
    if length == 1:
        laid = laid.reshape(-1, *moved).movedim(1, matrix.axis + 1).contiguous()
    if len(tables) > 1:
        return HeldSums(laid.flatten(1), tables, scale, size, dtype=dtype)
    if length == 1:
        return HeldIndices(laid[0], tables[0, :, 0], scale, None, dtype=dtype, fixed=fixed)
    return HeldIndices(laid[0], tables[0], scale, None, dtype=dtype, fixed=fixed, size=size)
