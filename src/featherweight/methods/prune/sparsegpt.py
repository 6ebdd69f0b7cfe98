"""SparseGPT: column after column, weights go and the columns behind them make up for it. Pure functions.

The loss of a pruned matrix is `tr(E H E^T)` with E = weight - pruned [rows, columns] and H the second moment of the
layer's inputs [columns, columns]. Frantar and Alistarh, arXiv:2301.00774.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

COLUMNS = 128  # between two choices of what goes (section 3.3 of the paper)


def inverse_factor(hessian: Tensor) -> Tensor | None:
    """The upper Cholesky factor U of the inverse, `H^-1 = U^T U`; None if H is not positive definite.

    Row i of U, divided by its diagonal, is what the columns behind i get of a change in column i; the square of its
    diagonal is `[H^-1]_ii` among the columns from i on.
    """
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper


def sparsegpt(
    weight: Tensor, factor: Tensor, choose: Callable[[Tensor], Tensor], allowed: Tensor, width: int = COLUMNS
) -> tuple[Tensor, Tensor]:
    """The pruned weight and its mask, both [rows, columns].

    `factor` is that of `inverse_factor`. At every `width` columns `choose` says which of them stay, from their scores
    `w^2 / [H^-1]` as earlier columns have left them (minus infinity where not `allowed`). Updates of the columns far
    behind are gathered over blocks of 128 columns or more, as products of matrices (algorithm 1).
    """
    weight, columns = weight.clone(), weight.shape[1]
    keep = torch.zeros_like(weight, dtype=torch.bool)
    block = width * max(1, COLUMNS // width)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        error = torch.zeros_like(weight[:, start:end])
        for column in range(start, end):
            if (column - start) % width == 0:
                some = slice(column, min(column + width, end))
                score = weight[:, some].square() / factor.diagonal()[some].square()
                keep[:, some] = choose(score.masked_fill(~allowed[:, some], -torch.inf)) & allowed[:, some]
            error[:, column - start] = weight[:, column] * ~keep[:, column] / factor[column, column]
            weight[:, column:end] -= error[:, column - start, None] * factor[column, column:end]
        weight[:, end:] -= error @ factor[start:end, end:]
    return weight * keep, keep
