"""factor.train: tensor trains in place of linear layers and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.context import Context
from ...model.factored import TensorTrain, TensorTrainEmbedding
from ...model.matrices import Matrix
from ...model.replacing import Convolution, Made, filled, missed_energy, shown
from .factoring import Factoring
from .networks import contracted, divided, tensor_train, train_cost, train_ranks

Dimensions = tuple[list[int], list[int]]  # of rows and of columns
NARROW = 4.0  # largest over smallest factor of a table's rows: from there on rows are added that nobody looks up


class TensorTrains(Factoring, kind="factor.train"):
    """Put a tensor train (matrix product operator) in place of the weight of each linear layer, and of tables.

    Rows and columns of a weight fall into `cores` dimensions each, as equal as their prime factors allow; a table gets
    rows that nobody looks up where its number of rows has no such factors. The rank between all cores is the largest
    that `keep` allows each layer. Cores are linear layers (tables) themselves, so that other steps quantize them. Two
    cores are a sum of Kronecker products. Fewer parameters are not less time: the report says which is slower. With
    `embeddings` tables are factored, with `retrain` the network is then trained.
    """

    paper: ClassVar[str] = "SIAM J. Sci. Comput. 33(5), 2011; arXiv:1509.06569; arXiv:1901.10787"

    cores: Annotated[int, Field(ge=2, le=6)] = 2
    embeddings: bool = False

    def obstacle(self, matrix: Matrix) -> str:
        if isinstance(matrix.layer, Convolution) or matrix.transposed:
            return "is a convolution; factor.svd, factor.tucker and factor.cp are for it"
        rows, columns = self._dimensions(matrix)
        pairs = sum(m * n > 1 for m, n in zip(rows, columns))
        if pairs < 2 or train_cost(rows, columns, 1) > self.keep * matrix.parameter().numel():
            return f"keep={self.keep} allows no tensor train of {rows} x {columns}"
        return ""

    def made(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterator[tuple[str, Made]]:
        for name, each in ctx.progress.track(found.items(), "finding factors", len(found)):
            rows, columns = self._dimensions(each)
            weight, rank = each.weight(), self._rank(rows, columns, each.parameter().numel())
            padded = nn.functional.pad(weight, (0, 0, 0, math.prod(rows) - len(weight)))
            cores = tensor_train(padded, rows, columns, train_ranks(rows, columns, rank))
            missed = missed_energy(weight, contracted(cores)[: len(weight)])
            text = shown(sum(core.numel() for core in cores), weight.numel(), missed)
            table = isinstance(each.layer, nn.Embedding)
            module = _table(cores) if table else _linear(cores, getattr(each.layer, "bias", None))
            yield name, Made(module, f"rank {rank} between cores of {rows} x {columns}: {text}")

    def _dimensions(self, matrix: Matrix) -> Dimensions:
        """Into what the rows and columns fall: large dimensions of rows stand beside small ones of columns."""
        rows, columns = len(matrix.weight()), matrix.columns
        high = divided(rows, self.cores)
        if isinstance(matrix.layer, nn.Embedding) and high[0] > NARROW * high[-1]:
            side = math.ceil(rows ** (1 / self.cores))
            high = [*[side] * (self.cores - 1), math.ceil(rows / side ** (self.cores - 1))]
        return high, divided(columns, self.cores)[::-1]

    def _rank(self, rows: list[int], columns: list[int], whole: int) -> int:
        """The largest rank within `keep`."""
        low, high = 1, math.prod(rows) * math.prod(columns)
        while low < high:
            middle = (low + high + 1) // 2
            if train_cost(rows, columns, middle) <= self.keep * whole:
                low = middle
            else:
                high = middle - 1
            if train_ranks(rows, columns, low) == train_ranks(rows, columns, high):
                break
        return low


def _linear(cores: list[Tensor], bias: Tensor | None) -> TensorTrain:
    """The layer with these cores [rank before, column, row, rank behind]."""
    ranks = [core.shape[-1] for core in cores[:-1]]
    made = TensorTrain([c.shape[2] for c in cores], [c.shape[1] for c in cores], ranks, bias is not None)
    for layer, core in zip(made.cores, cores):
        filled(layer, core.permute(2, 3, 0, 1).flatten(2).flatten(0, 1))
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


def _table(cores: list[Tensor]) -> TensorTrainEmbedding:
    """The table with these cores [rank before, column, row, rank behind]."""
    ranks = [core.shape[-1] for core in cores[:-1]]
    made = TensorTrainEmbedding([c.shape[2] for c in cores], [c.shape[1] for c in cores], ranks)
    for layer, core in zip(made.cores, cores):
        filled(layer, torch.movedim(core, 2, 0).flatten(1))
    return made
