"""Trellis-coded rounding of a matrix: rotation, feedback between columns, and the search for the best paths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.trellis import Trellis, code, rotate, windows
from .gptq import damped, factors
from .viterbi import tail_biting

WINDOWS = 10  # that a sequence has at least, if the matrix has: at 2 bits, circular paths so short lose under 5%
LONG = 128  # steps; longer paths are no better


def layout(rows: int, columns: int, bits: int, window: int) -> tuple[int, int] | None:
    """Columns that are searched together, and steps of a sequence; None if the matrix is shorter than a window.

    Columns are taken one by one, because each makes up for the errors of those before; only where a column is too short
    for a good path, several are taken as one. Long ones are cut into equal sequences, which are searched side by side.
    """
    together = next(each for each in _divisors(columns) if rows * each * bits >= WINDOWS * window or each == columns)
    length = rows * together
    if length * bits < window:
        return None
    return together, next((steps for steps in _divisors(length) if steps >= LONG), length)


def _divisors(number: int) -> list[int]:
    small = [each for each in range(1, math.isqrt(number) + 1) if number % each == 0]
    return sorted({*small, *(number // each for each in small)})


def signs(count: int, generator: torch.Generator) -> Tensor:
    """Random signs of a rotation: bool, True for +1."""
    return torch.randint(0, 2, (count,), generator=generator).bool()


def rotated_moment(hessian: Tensor, sign: Tensor) -> Tensor:
    """The second moments [..., n, n] of rotated inputs."""
    return rotate(rotate(hessian, sign).mT, sign).mT


def encode(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    window: int = 12,
    damping: float = 0.01,
    left: Tensor | None = None,
    right: Tensor | None = None,
    rounds: int = 1,
) -> tuple[Trellis, float] | None:
    """The trellis code of `weight`, and its relative error `tr(E H E^T) / tr(W H W^T)` in units of `hessian`.

    `weight` is [rows, ...], `hessian` [groups, inputs, inputs] for as many groups of rows. `left` and `right` are the
    signs of rotations of columns and rows (see `Trellis`). Columns are coded in order, each after what the earlier ones
    lost is added to it (LDLQ with trellis codes, arXiv:2406.11235, algorithm 5). `rounds` times the scale is fitted to
    the codes, and the columns coded anew; the best is given. None if the matrix is shorter than a window, or if the
    damped Hessian is not positive definite.
    """
    matrix = weight.detach().flatten(1).double()
    moment = _damped(hessian.double(), damping)
    if right is not None:
        matrix, moment = rotate(matrix, _floats(right)), rotated_moment(moment, _floats(right))
    if left is not None:
        matrix = rotate(matrix.mT.contiguous(), _floats(left)).mT.contiguous()
    found, shape = [factors(each) for each in moment], layout(len(matrix), matrix.shape[1], bits, window)
    if shape is None or any(each is None for each in found):
        return None
    units, costs = (torch.stack([each[place] for each in found if each is not None]) for place in (0, 1))
    table = code(torch.arange(2**window), window)
    scale = (matrix.square().mean().sqrt() * math.sqrt(1 - 4.0**-bits)).half()
    best: tuple[float, Trellis] | None = None
    for _ in range(rounds + 1):
        symbols, values = _columns(matrix, units, costs, float(scale), table, bits, shape)
        fitted = _fitted(matrix, values, moment).half()
        for each in {float(scale), float(fitted)}:
            loss = _loss(matrix - values * each, moment)
            if best is None or loss < best[0]:
                made = Trellis(symbols, torch.tensor([each]).half(), tuple(weight.shape), bits, window, left, right)
                best = loss, made
        scale = fitted
    assert best is not None
    return best[1], best[0] / _loss(matrix, moment)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Each group's Hessian, damped; a group whose inputs are all zero takes a trace of what the others have."""
    own = torch.stack([damped(each, damping) for each in hessian])
    trace = 1e-6 * damping * hessian.diagonal(dim1=1, dim2=2).mean()
    return own + trace * torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)


def _floats(sign: Tensor) -> Tensor:
    return sign.double() * 2 - 1


def _columns(
    matrix: Tensor, units: Tensor, costs: Tensor, scale: float, table: Tensor, bits: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Code `matrix` [rows, columns] column after column: the symbols [sequences, steps], and the values they stand for.

    `units` and `costs` are `factors` of the Hessian of each group of rows. A tile of columns should miss by
    `-E U[before, tile] / U[tile, tile]` if E is what those before it miss by: then all that is lost is its own error.
    """
    together, steps = shape
    groups, errors, values = len(units), torch.zeros_like(matrix), torch.zeros_like(matrix)
    grouped = errors.view(groups, -1, errors.shape[1])
    symbols = []
    for start in range(0, matrix.shape[1], together):
        tile = slice(start, start + together)
        wanted = grouped[:, :, :start] @ units[:, :start, tile]
        wanted = torch.linalg.solve_triangular(units[:, tile, tile], wanted, upper=True, left=False, unitriangular=True)
        target = (matrix[:, tile] + wanted.reshape(-1, together)) / max(scale, torch.finfo(torch.float16).tiny)
        weight = costs[:, None, tile].expand(-1, len(matrix) // groups, -1).reshape(-1, together)
        alike = together == 1 and groups == 1
        weights = None if alike else _sequences(weight / weight.mean(), steps)
        chosen = tail_biting(_sequences(target, steps), table, bits, weights)
        values[:, tile] = table[windows(chosen.mT, bits, table.numel().bit_length() - 1)].view(together, -1).mT
        errors[:, tile] = matrix[:, tile] - values[:, tile] * scale
        symbols.append(chosen.mT)
    return torch.cat(symbols), values


def _sequences(tile: Tensor, steps: int) -> Tensor:
    """A tile [rows, columns], column after column, cut into sequences: [steps, sequences], float32."""
    return tile.mT.reshape(-1, steps).mT.float()


def _fitted(matrix: Tensor, values: Tensor, moment: Tensor) -> Tensor:
    """The scale of least loss for these values."""
    grouped = values.view(len(moment), -1, values.shape[1]) @ moment
    return (grouped.view_as(matrix) * matrix).sum() / (grouped.view_as(values) * values).sum().clamp_min(1e-300)


def _loss(error: Tensor, moment: Tensor) -> float:
    grouped = error.view(len(moment), -1, error.shape[1])
    return float(((grouped @ moment) * grouped).sum())
