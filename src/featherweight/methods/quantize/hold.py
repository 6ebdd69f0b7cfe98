"""Integers and their grid put in place of a layer's weight."""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.model.held import HeldIndices, HeldIntegers
from featherweight.model.matrices import Matrix, put

from .grids import Grid


@torch.no_grad()
def hold(matrix: Matrix, integers: Tensor, grid: Grid, bits: int) -> None:
    """Put integers [rows, columns] and their grid in place of a layer's weight (and of its twins')."""
    weight = matrix.parameter()
    moved = (weight.shape[matrix.axis], *(size for dim, size in enumerate(weight.shape) if dim != matrix.axis))
    values = integers.reshape(moved).movedim(0, matrix.axis).contiguous()
    dtype = str(weight.dtype).removeprefix("torch.")
    scale = grid.scale if grid.group < matrix.columns else grid.scale[:, 0]
    group = grid.group if grid.group < matrix.columns else None
    link: HeldIndices | HeldIntegers
    if grid.table is not None:
        link = HeldIndices(values.to(torch.uint8), grid.table, scale, matrix.axis, group, grid.half, dtype)
    else:
        kind = torch.int8 if grid.low < 0 else torch.uint8
        zero = grid.zero if grid.zero.dim() == 0 or group is not None else grid.zero[:, 0]
        zero = zero.to(kind) if grid.whole else zero
        link = HeldIntegers(values.to(kind), scale, zero, matrix.axis, bits, group, grid.half, dtype)
    put(matrix, link)
