"""Trellis-coded rounding of a matrix: rotation, feedback between columns, and the search for the best paths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.trellis import Trellis, code, rotate, turn, unturn, windows
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


@dataclass(frozen=True)
class Rotated:
    """A weight where it is coded: balanced and rotated, with what its Hessian says; float64.

    `matrix` is [rows, columns], `moment` the damped Hessian [groups, columns, columns], `units` and `costs` its
    `factors`, `shape` that of the weight, `left` and `right` how it is turned back (see `Trellis`), and `worth`
    what the loss makes of one unit of error in a row here.
    """

    matrix: Tensor
    moment: Tensor
    units: Tensor
    costs: Tensor
    shape: tuple[int, ...]
    left: Tensor | None = None
    right: Tensor | None = None
    worth: float = 1.0

    @property
    def alike(self) -> tuple[int, int, int]:
        """Weights for which this is equal can be coded side by side."""
        return self.matrix.shape[0], self.matrix.shape[1], len(self.moment)


def rotated(
    weight: Tensor,
    hessian: Tensor,
    damping: float = 0.01,
    generator: torch.Generator | None = None,
    outputs: Tensor | None = None,
) -> Rotated | None:
    """`weight` [rows, ...] and its `hessian` [groups, inputs, inputs], for as many groups of rows, ready to be coded.

    `outputs` [rows] is how much each output matters (all alike if None). With a `generator`, rows and columns are
    balanced and rotated (rows not, where there are several groups). A code of one rate has one error for all, so what
    is lost is the product of the mean energy of the weights and the mean of what an error costs; balancing makes it
    least: columns are divided by their norm, as feedback only keeps the product of their costs, and rows multiplied by
    the root of `sqrt(outputs) / norm` (Cauchy-Schwarz). None if the damped Hessian is not positive definite.
    """
    matrix, moment = weight.detach().flatten(1).double(), _damped(hessian.double(), damping)
    outputs = torch.ones(len(matrix)) if outputs is None else outputs
    outputs = (outputs / outputs.sum().clamp_min(1e-30)).double()
    left = right = None
    if generator is not None:
        right = turn(_signs(matrix.shape[1], generator), _relative(_norms(matrix, 0)))
        sign, magnitude = (each.double() for each in unturn(right))
        matrix = rotate(matrix / magnitude, sign)
        moment = rotate(rotate(moment * magnitude * magnitude[:, None], sign).mT, sign).mT
    if generator is not None and len(moment) == 1:
        wanted = _norms(matrix, 1) / outputs.clamp_min(1e-6 * float(outputs.mean())).sqrt()
        left = turn(_signs(len(matrix), generator), _relative(wanted).sqrt())
        sign, magnitude = (each.double() for each in unturn(left))
        matrix = rotate(matrix.mT / magnitude, sign).mT.contiguous()
        outputs = outputs * magnitude.square()
    found = [factors(each) for each in moment]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return None
    units, costs = (torch.stack([each[place] for each in known]) for place in (0, 1))
    return Rotated(matrix, moment, units, costs, tuple(weight.shape), left, right, float(outputs.mean()))


def _signs(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (count,), generator=generator).bool()


def _norms(matrix: Tensor, dim: int) -> Tensor:
    return matrix.square().mean(dim).sqrt()


def _relative(values: Tensor) -> Tensor:
    """`values` over their geometric mean; those that are nearly zero count as small."""
    values = values.clamp_min(1e-3 * float(values.mean()) + 1e-30)
    return values / values.log().mean().exp()


def encode(given: Sequence[Rotated], bits: int, window: int = 12, rounds: int = 1) -> list[tuple[Trellis, float]]:
    """The trellis codes of weights that are `alike`, each with its relative error `tr(E H E^T) / tr(W H W^T)`.

    Columns are coded in order, each after what the earlier ones lost is added to it (LDLQ with trellis codes,
    arXiv:2406.11235, algorithm 5). `rounds` times the scale is fitted to the codes, and the columns coded anew; the
    best is given. Raises `ValueError` if the matrix is shorter than a window.
    """
    matrix, moment = torch.stack([each.matrix for each in given]), torch.stack([each.moment for each in given])
    units, costs = torch.stack([each.units for each in given]), torch.stack([each.costs for each in given])
    shape = layout(matrix.shape[1], matrix.shape[2], bits, window)
    if shape is None:
        raise ValueError(f"{matrix[0].numel()} weights of {bits} bits are shorter than a window of {window} bits")
    table, whole = code(torch.arange(2**window), window), _energy(matrix, moment).clamp_min(1e-300)
    scale = (matrix.square().mean((1, 2)).sqrt() * math.sqrt(1 - 4.0**-bits)).half()
    best: list[tuple[Trellis, float] | None] = [None] * len(given)
    for _ in range(rounds + 1):
        symbols, values = _columns(matrix, units, costs, scale.double(), table, bits, shape)
        fitted = _fitted(matrix, values, moment).half()
        for tried in (scale, fitted):
            losses = (_energy(matrix - values * tried.double()[:, None, None], moment) / whole).tolist()
            for place, (each, before, loss) in enumerate(zip(given, best, losses)):
                if before is None or loss < before[1]:
                    kept = tried[place : place + 1].clone()
                    best[place] = Trellis(symbols[place], kept, each.shape, bits, window, each.left, each.right), loss
        scale = fitted
    return [each for each in best if each is not None]


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """Each group's Hessian, damped; a group whose inputs are all zero takes a trace of what the others have."""
    own = torch.stack([damped(each, damping) for each in hessian])
    trace = 1e-6 * damping * hessian.diagonal(dim1=1, dim2=2).mean()
    return own + trace * torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)


def _columns(
    matrix: Tensor, units: Tensor, costs: Tensor, scale: Tensor, table: Tensor, bits: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Code `matrix` [layers, rows, columns] column after column: symbols [layers, sequences, steps], and their values.

    `units` and `costs` are `factors` of the Hessian of each layer and group of rows. A tile of columns should miss by
    `-E U[before, tile] / U[tile, tile]` if E is what those before it miss by: then all that is lost is its own error.
    """
    (layers, rows, columns), groups, (together, steps) = matrix.shape, units.shape[1], shape
    window, errors, values = len(table).bit_length() - 1, torch.zeros_like(matrix), torch.zeros_like(matrix)
    grouped, scale = errors.view(layers, groups, -1, columns), scale[:, None, None]
    symbols = []
    for start in range(0, columns, together):
        tile = slice(start, start + together)
        wanted = grouped[..., :start] @ units[:, :, :start, tile]
        own = units[:, :, tile, tile]
        wanted = torch.linalg.solve_triangular(own, wanted, upper=True, left=False, unitriangular=True)
        target = (matrix[:, :, tile] + wanted.view(layers, rows, -1)) / scale.clamp_min(torch.finfo(torch.float16).tiny)
        weights = None
        if together > 1 or groups > 1:
            weights = costs[:, :, None, tile].expand(-1, -1, rows // groups, -1).reshape(layers, rows, -1)
            weights = _sequences(weights / weights.mean((1, 2), keepdim=True), steps)
        chosen = tail_biting(_sequences(target, steps), table, bits, weights).mT
        values[:, :, tile] = table[windows(chosen, bits, window)].view(layers, together, rows).mT.double()
        errors[:, :, tile] = matrix[:, :, tile] - values[:, :, tile] * scale
        symbols.append(chosen.reshape(layers, -1, steps))
    return torch.cat(symbols, 1), values


def _sequences(tile: Tensor, steps: int) -> Tensor:
    """Tiles [layers, rows, columns], column after column, cut into sequences: [steps, sequences], float32."""
    return tile.mT.reshape(-1, steps).mT.float()


def _fitted(matrix: Tensor, values: Tensor, moment: Tensor) -> Tensor:
    """The scale of least loss for these values, one per layer."""
    layers, groups, columns = len(matrix), moment.shape[1], matrix.shape[2]
    weighted = (values.view(layers, groups, -1, columns) @ moment).view_as(values)
    return (weighted * matrix).sum((1, 2)) / (weighted * values).sum((1, 2)).clamp_min(1e-300)


def _energy(matrix: Tensor, moment: Tensor) -> Tensor:
    """`tr(M H M^T)` of each layer."""
    grouped = matrix.view(len(matrix), moment.shape[1], -1, matrix.shape[2])
    return ((grouped @ moment) * grouped).sum((1, 2, 3))
