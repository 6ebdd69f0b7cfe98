"""quantize.weights: weights as integers in groups, activations in floats."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from featherweight.core.blocks import Block
from featherweight.core.context import Context
from featherweight.core.errors import NotFinite, RecipeError
from featherweight.core.soft import copied
from featherweight.core.step import OneOf, Place, Trait
from featherweight.model.coverage import tell
from featherweight.model.matrices import Matrix, chosen_matrices
from featherweight.model.moments import Moments, Stage, corrected, gather, observe, stages
from featherweight.model.select import LayerStep

from .awq import search_scales
from .folding import producer, rescale
from .gptq import factors, gptq, sorted_order
from .grids import (
    NF4,
    Grid,
    affine_by_range,
    centred_by_range,
    clipped,
    rescaled,
    symmetric_by_range,
    table_by_range,
    ternary_by_range,
)
from .hold import hold
from .hqq import half_quadratic

ONLY_GPTQ = ("act_order", "damping", "beam", "refine", "compensate", "scaling")
SORTED = 512  # columns at the end of the order that are sorted where inputs are few
Bits = Literal[8, 6, 5, 4, 3, 2, 1, "ternary"]


class WeightQuantization(LayerStep, kind="quantize.weights"):
    """Store the weights of linear layers and convolutions as integers of few bits, with one scale per group of inputs.

    Activations stay in floats. `method`: `rtn` rounds to nearest; `hqq` finds robust zero points without data; `gptq`
    lets later columns make up for earlier ones, by second moments of the inputs; `awq` scales inputs up that carry
    much before it rounds. `group` neighbours share a float16 scale (None: a whole row). `symmetric` stores no zero
    points; with 2 bits and 1 its grid has half steps. `clipping` searches the scales of least (weighted) error.
    With GPTQ `act_order` rounds large inputs first (by sorted QR, if calibration saw fewer rows than columns),
    `damping` is the share of the mean diagonal added to the Hessian, `beam` beginnings of each row are kept (None: 8,
    or 1 for matrices of over a million weights), `refine` times scales are fitted to the integers (which are rounded
    anew in between), `scaling` scales inputs as AWQ does before, and `compensate` measures the error from where the
    original network was. The blocks of a model are gone through one after the other, each with inputs from the rounded
    ones before it. `embeddings` are stored too, rounded to nearest (or `hqq`). `layer_bits` gives layers whose names
    match a glob other bits ({"*.v_proj": 4}).
    Raises `RecipeError` if `group` divides no chosen layer, `NotFinite` if calibration meets NaN.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"uint4"})
    place: ClassVar[Place | None] = Place.ENCODE
    gains: ClassVar[frozenset[str]] = frozenset({"size"})
    paper: ClassVar[str] = "arXiv:2210.17323"

    bits: Annotated[Bits, OneOf(8, 4, 3)] = 4
    group: Annotated[int | None, Field(ge=2)] = 32
    method: Annotated[Literal["rtn", "hqq", "gptq", "awq"], OneOf("rtn", "hqq", "gptq", "awq")] = "gptq"
    symmetric: bool = False
    format: Literal["affine", "nf4"] = "affine"
    clipping: bool = True
    act_order: bool = True
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    beam: Annotated[int | None, Field(ge=1, le=256)] = None
    refine: Annotated[int, Field(ge=0, le=20)] = 4
    compensate: bool = True
    scaling: bool = False
    embeddings: bool = False
    layer_bits: dict[str, Bits] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits(self) -> WeightQuantization:
        bits = {self.bits, *self.layer_bits.values()}
        if self.format == "nf4" and bits != {4}:
            raise ValueError("the format nf4 has 4 bits; set bits: 4")
        if self.format == "nf4" and self.symmetric:
            raise ValueError("the format nf4 has a table of its own; leave symmetric out")
        if self.method == "hqq" and (self.format == "nf4" or self.symmetric or bits & {1, "ternary"}):
            raise ValueError("hqq finds zero points: it needs format affine, symmetric false and 2 bits or more")
        changed = [name for name in ONLY_GPTQ if getattr(self, name) != type(self).model_fields[name].default]
        if self.method != "gptq" and changed:
            raise ValueError(f"{changed[0]} is a setting of the method gptq; leave it out with {self.method}")
        return self

    def alone(self) -> WeightQuantization:
        """Without what makes up for other layers or changes them: compensation and scaling, settings of GPTQ."""
        return self.model_copy(update={"compensate": False, "scaling": False}) if self.method == "gptq" else self

    def forms(self) -> frozenset[str]:
        return frozenset(self._form(bits) for bits in (self.bits, *self.layer_bits.values()))

    def _form(self, bits: Bits) -> str:
        if self.format == "nf4":
            return "codebook4"
        if bits == "ternary":
            return "int2"
        return f"{'int' if self.symmetric and bits > 2 else 'uint'}{bits}"

    def bits_of(self, name: str) -> Bits:
        """The bits of the layer called `name`: those of the first glob in `layer_bits` that matches, else `bits`."""
        return next((bits for glob, bits in self.layer_bits.items() if fnmatchcase(name, glob)), self.bits)

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        matrices = {}
        for matrix in chosen_matrices(self, model, ctx):
            if matrix.keep is not None and not self._has_zero(matrix.name):
                ctx.leave(matrix.name, "it is pruned, and this grid has no 0")
            else:
                matrices[matrix.name] = matrix
        self.check_group(list(matrices.values()))
        for glob in self.layer_bits:
            if not any(fnmatchcase(name, glob) for name in matrices):
                ctx.warn(f"{self.kind}: layer_bits: no chosen layer matches {glob!r}")
        waiting = dict(matrices)
        if self.method in ("gptq", "awq") and matrices:
            tell(model, ctx)
            for block in ctx.blocks(model):
                self.quantize_block(block, waiting, ctx)
            self._rest(model, waiting, ctx)
        for matrix in list(waiting.values()):
            self._round(waiting.pop(matrix.name), None, ctx)
        return model

    def _has_zero(self, name: str) -> bool:
        """Whether 0 is a point of every grid of this layer."""
        bits = self.bits_of(name)
        return self.method != "hqq" and bits != 1 and not (self.symmetric and bits == 2)

    def check_group(self, matrices: list[Matrix]) -> None:
        if self.group is not None and matrices and not any(m.columns % self.group == 0 for m in matrices):
            sizes = ", ".join(str(size) for size in sorted({m.columns for m in matrices})[:6])
            raise RecipeError(
                f"{self.kind}: group={self.group} divides no chosen layer (their inputs: {sizes}); "
                "choose a divisor, or null for one scale per row"
            )

    # -- the layers of a block, and the others ---------------------------------------------------------------------
    def quantize_block(self, block: Block, waiting: dict[str, Matrix], ctx: Context) -> None:
        """Quantize the chosen layers of one block: first its tables, then the others in the order in which they run."""
        prefix = f"{block.name}."
        inside = [
            name.removeprefix(prefix)
            for name, matrix in waiting.items()
            if name.startswith(prefix) and not matrix.lookup and not matrix.transposed
        ]
        original = copied(block.module) if inside and self.compensate and self.method == "gptq" else None
        for name in [name for name, matrix in waiting.items() if name.startswith(prefix) and matrix.lookup]:
            self._round(waiting.pop(name), None, ctx)
        if not inside:
            return
        found = stages(block, inside)
        if self.method == "awq" or self.scaling:
            moments = {name: each for stage in found for name, each in gather(block, None, stage).items()}
            scaled = {name for stage in found for name in self._scale(block, stage, waiting, moments, ctx)}
            for name in moments.keys() - scaled:
                ctx.leave(f"{prefix}{name} (scaling)", "nothing takes the inverse of its scales, or scales do not help")
        if self.method == "awq":
            for name, each in moments.items():
                self._round(waiting.pop(prefix + name), each, ctx)
            return
        for stage in found:
            for name, each in gather(block, original, stage).items():
                self._round(waiting.pop(prefix + name), each, ctx)

    def round_block(self, block: Block, waiting: dict[str, Matrix], ctx: Context) -> None:
        """Quantize what is left of a block without data."""
        for name in [name for name in waiting if name.startswith(f"{block.name}.")]:
            matrix = waiting.pop(name)
            if self.method in ("gptq", "awq"):
                ctx.warn(f"{name}: its inputs on the first batch are not known; rounded to nearest")
            self._round(matrix, None, ctx)

    def _rest(self, model: nn.Module, waiting: dict[str, Matrix], ctx: Context) -> None:
        """Quantize the layers that are in no block, all with the inputs that they get now."""
        names = [name for name, matrix in waiting.items() if not matrix.lookup and not matrix.transposed]
        moments = observe(model, names, ctx) if names else {}
        for name in names:
            if self.method == "awq" or self.scaling:
                ctx.leave(f"{name} (scaling)", "it is in no block, where what makes its inputs is not known")
            self._round(waiting.pop(name), moments[name], ctx)

    @torch.no_grad()
    def _scale(
        self, block: Block, stage: Stage, waiting: dict[str, Matrix], moments: dict[str, Moments], ctx: Context
    ) -> list[str]:
        """Scale the inputs of a stage's layers where what makes them can take the inverse; gives those scaled."""
        layers = [waiting[f"{block.name}.{name}"] for name in stage.layers]
        source = producer(block, stage)
        each = moments[stage.layers[0]]
        if source is None or any(matrix.keep is not None for matrix in layers) or not each.rows:
            return []
        assert each.largeness is not None
        hessian, largeness = each.mean()[0], each.largeness[0]

        def rounded(weight: Tensor, importance: Tensor) -> Tensor:
            grid = self._grid(weight, layers[0], importance, candidates=8)
            return grid.points(grid.nearest(weight))

        scales, share = search_scales([matrix.weight() for matrix in layers], largeness, hessian, rounded)
        if share == 0:
            return []
        rescale(block.module.get_submodule(source), [matrix.layer for matrix in layers], scales)
        for name in stage.layers:
            total = moments[name].hessian
            assert total is not None
            total.div_(scales[:, None] * scales)
        ctx.change(f"{block.name}.{source}", f"outputs divided by scales of its readers' inputs (AWQ, share {share:g})")
        return stage.layers

    # -- one layer -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _round(self, matrix: Matrix, moments: Moments | None, ctx: Context) -> None:
        """Choose the integers of one matrix and hold them in its layer."""
        weight, how = matrix.weight(), self.method
        if moments is not None and (moments.hessian is None or not bool(moments.hessian.any())):
            ctx.warn(f"{matrix.name}: its inputs in the calibration data are none or 0; rounded to nearest")
            moments, how = None, "rtn"
        elif moments is not None and not bool(torch.isfinite(moments.hessian).all()):  # type: ignore[arg-type]
            raise NotFinite(f"{self.kind}: the inputs of {matrix.name} hold NaN or infinite values in calibration")
        if moments is None and self.method in ("gptq", "awq"):
            how = "rtn"
        if how == "gptq" and moments is not None:
            found = self._gptq(weight, matrix, moments, ctx)
        else:
            importance = moments.mean()[0].diagonal() if moments is not None and moments.mean().shape[0] == 1 else None
            grid = self._grid(weight, matrix, importance)
            if self.clipping and self.method != "hqq" and grid.high - grid.low > 7:
                grid = rescaled(weight, grid, importance)  # with fewer points the search went through all zero points
            found = grid.nearest(weight), grid
        bits = self.bits_of(matrix.name)
        hold(matrix, *found, 2 if bits == "ternary" else bits)
        ctx.change(matrix.name, f"{matrix.form()}, {matrix.grouping(self.group)}, {how}")

    def _grid(self, weight: Tensor, matrix: Matrix, importance: Tensor | None, candidates: int = 40) -> Grid:
        """The grid of a matrix: over its range, then with what is searched."""
        bits = self.bits_of(matrix.name)
        grid = self._by_range(weight, matrix.group(self.group), bits).fitting()
        if self.method == "hqq":
            return half_quadratic(weight, grid.stored()).stored()
        if self.clipping or bits in (1, "ternary"):
            grid = clipped(weight, grid, importance, candidates)
        return grid.stored()

    def _by_range(self, weight: Tensor, group: int, bits: Bits) -> Grid:
        if self.format == "nf4":
            return table_by_range(weight, group, NF4)
        if bits == "ternary":
            return ternary_by_range(weight, group)
        if bits == 1 or (self.symmetric and bits == 2):
            return centred_by_range(weight, group, bits)
        make = symmetric_by_range if self.symmetric else affine_by_range
        return make(weight, group, bits)

    def _gptq(self, weight: Tensor, matrix: Matrix, moments: Moments, ctx: Context) -> tuple[Tensor, Grid]:
        """Integers and grid by GPTQ, one part of a grouped convolution after the other."""
        sorted_columns = SORTED if moments.rows < matrix.columns else 0
        if moments.note:
            ctx.warn(f"{matrix.name}: drift is not made up for: {moments.note}")
        if moments.drift is not None:
            aim = corrected(weight, moments, self.damping)
            if aim is None:
                ctx.warn(f"{matrix.name}: drift is not made up for: its inputs give no finite solution")
            else:
                weight = aim if matrix.keep is None else aim * matrix.keep
        parts = []
        hessians = moments.mean()
        size = len(weight) // len(hessians)
        for place, hessian in enumerate(hessians):
            cut = slice(place * size, (place + 1) * size)
            keep = None if matrix.keep is None else matrix.keep[cut]
            parts.append(self._solve(weight[cut], matrix, hessian, keep, sorted_columns, ctx))
        integers = torch.cat([found for found, _ in parts])
        grids = [grid for _, grid in parts]
        zero = grids[0].zero if grids[0].zero.dim() == 0 else torch.cat([grid.zero for grid in grids])
        scale = torch.cat([grid.scale for grid in grids])
        return integers, replace(grids[0], scale=scale, zero=zero)

    def _solve(
        self, weight: Tensor, matrix: Matrix, hessian: Tensor, keep: Tensor | None, sorted_columns: int, ctx: Context
    ) -> tuple[Tensor, Grid]:
        """GPTQ of one matrix, with more damping where the Hessian is not positive definite, and to nearest at last."""
        base, added = float(hessian.diagonal().mean()), 0.0
        for damping in (self.damping, 10 * self.damping, max(1.0, self.damping)):
            hessian.diagonal().add_((damping - added) * base)  # in place: a large one is held only once
            added = damping
            order = sorted_order(hessian, sorted_columns) if self.act_order else torch.arange(len(hessian))
            known = factors(hessian[order][:, order])
            if known is None:
                continue
            if damping > self.damping:
                ctx.warn(f"{matrix.name}: its Hessian is not positive definite; damped by {damping:g}")
            importance = torch.empty_like(known[1])
            importance[order] = known[1]
            grid = self._grid(weight, matrix, importance)
            width = self.beam or (8 if weight.numel() <= 2**20 else 1)
            found = gptq(weight, grid, hessian, order, keep, width, self.refine, known)
            assert found is not None
            return found
        ctx.warn(f"{matrix.name}: its Hessian is not positive definite even when damped; rounded to nearest")
        grid = self._grid(weight, matrix, None)
        return grid.nearest(weight), grid
