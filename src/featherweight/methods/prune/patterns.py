"""Which weights go together and which compete: masks from scores. Pure functions on matrices [rows, columns].

A mask is boolean, True where a weight stays. A score of minus infinity marks what must not stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...model.masks import keep_largest


@dataclass(frozen=True)
class Pattern:
    """The shape of zeros: blocks of `block` rows and columns (0 columns: whole rows), or `kept` of every `of`
    neighbours in a row.
    """

    block: tuple[int, int] = (1, 1)
    kept: int = 0
    of: int = 0

    @classmethod
    def of_setting(cls, setting: str | tuple[int, int]) -> Pattern:
        """The pattern that a setting names: "none", "row", "2:4", or rows and columns of a block."""
        if isinstance(setting, tuple):
            return cls(block=setting)
        if setting in ("none", "row"):
            return cls(block=(1, 0 if setting == "row" else 1))
        kept, _, of = setting.partition(":")
        return cls(kept=int(kept), of=int(of))

    @property
    def name(self) -> str:
        """What the encoding calls it: "2:4", "4x4", "row"; empty for single weights."""
        if self.of:
            return f"{self.kept}:{self.of}"
        rows, columns = self.block
        return "row" if not columns else "" if self.block == (1, 1) else f"{rows}x{columns}"

    def kept_at(self, sparsity: float) -> int:
        """How many of a group stay at this sparsity, rounded up."""
        return max(self.kept, math.ceil(self.of * (1 - sparsity) - 1e-6))

    def unit(self, columns: int) -> tuple[int, int]:
        """Rows and columns of what stays or goes as one, in a matrix of so many columns."""
        return self.block[0], self.block[1] or columns

    def obstacle(self, rows: int, inputs: int, places: int = 1) -> str:
        """Why the weights from `inputs` to `rows` outputs, at each of so many `places` of a kernel, cannot have this
        pattern; empty if they can. A group or block of which parts lie at two places is none that a kernel takes.
        """
        columns = inputs * places
        if self.of and columns % self.of:
            return f"its rows of {columns} weights are no groups of {self.of}"
        high, wide = self.unit(columns)
        if rows % high or columns % wide:
            return f"its {rows} x {columns} weights are no blocks of {high} x {wide}"
        neighbours = self.of or self.block[1] or 1
        if inputs % neighbours:
            return f"its {inputs} inputs at a place of the kernel are no groups of {neighbours}"
        return ""


def keep_n_of_m(score: Tensor, kept: int, of: int) -> Tensor:
    """True for the `kept` largest of every `of` neighbours in a row; of equal ones the first (arXiv:2104.08378).

    The number of columns must be a multiple of `of`.
    """
    groups = score.reshape(-1, of)
    order = torch.sort(groups, dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).reshape(score.shape)


def by_unit(score: Tensor, unit: tuple[int, int]) -> Tensor:
    """The mean score of each block, [rows / high, columns / wide].

    What must not stay counts as 0, and a block of which nothing may stay as minus infinity.
    """
    high, wide = unit
    blocks = score.unfold(0, high, high).unfold(1, wide, wide).flatten(2)
    barred = blocks == -torch.inf
    return blocks.masked_fill(barred, 0).mean(2).masked_fill(barred.all(2), -torch.inf)


def over_unit(mask: Tensor, unit: tuple[int, int]) -> Tensor:
    """A mask of blocks as one of single weights."""
    return mask.repeat_interleave(unit[0], 0).repeat_interleave(unit[1], 1)


def keep_largest_in_rows(score: Tensor, share: float) -> Tensor:
    """True for the largest `share` of each row (rounded); of equal ones the first."""
    count = math.floor(share * score.shape[1] + 0.5)
    order = torch.sort(score, dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def keep_largest_of_all(
    scores: Sequence[Tensor], share: float, least: float = 0.0, sizes: Sequence[int] | None = None
) -> list[Tensor]:
    """One mask per tensor; together they keep `share` of all weights (rounded to whole units), the largest scores.

    `sizes` are the weights behind one entry of each tensor (1 by default). Each tensor keeps at least a share of
    `least` of its own entries, and at least one, whatever the others have; where these alone are more than `share`,
    only they are kept. Of equal entries the first are kept.
    """
    sizes = sizes or [1] * len(scores)
    sure = [keep_largest(score, max(1, round(min(least, share) * score.numel()))) for score in scores]
    flat = torch.cat([torch.where(mask, torch.inf, score.double()).flatten() for score, mask in zip(scores, sure)])
    weights = torch.cat([torch.full((score.numel(),), size, device=flat.device) for score, size in zip(scores, sizes)])
    order = torch.sort(flat, descending=True, stable=True).indices
    before = weights[order].cumsum(0) - weights[order]
    taken = before + weights[order] / 2 <= share * int(weights.sum())
    keep = torch.zeros_like(flat, dtype=torch.bool).scatter_(0, order, taken)
    parts = keep.split([score.numel() for score in scores])
    return [mask | part.reshape(mask.shape) for mask, part in zip(sure, parts)]


def masks(
    scores: Sequence[Tensor], sparsity: Sequence[float], pattern: Pattern, scope: str, least: float = 0.0
) -> list[Tensor]:
    """A mask for each matrix of scores, at its `sparsity`: the share of weights that go.

    `scope` says what competes: all weights of all matrices ("global"; their sparsities are then the same), those of one
    matrix ("layer"), or of one row ("row": a row of blocks). With n of m, groups of m compete, and as many are kept as
    the sparsity asks for, rounded up.
    """
    if pattern.of:
        return [keep_n_of_m(score, pattern.kept_at(share), pattern.of) for score, share in zip(scores, sparsity)]
    units = [pattern.unit(score.shape[1]) for score in scores]
    worth = [by_unit(score, unit) for score, unit in zip(scores, units)]
    sizes = [high * wide for high, wide in units]
    if scope == "global":
        found = keep_largest_of_all(worth, 1 - sparsity[0], least, sizes)
    elif scope == "row":
        found = [keep_largest_in_rows(each, 1 - share) for each, share in zip(worth, sparsity)]
    else:
        found = [keep_largest_of_all([each], 1 - share)[0] for each, share in zip(worth, sparsity)]
    return [over_unit(mask, unit) for mask, unit in zip(found, units)]
