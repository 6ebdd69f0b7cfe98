"""Layers in factors: a row of ordinary layers, or tensor trains whose cores are ordinary layers, in place of one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Factored(nn.Sequential):
    """A row of layers without anything between them, which stands for one linear layer or convolution."""

    @property
    def weight(self) -> Tensor:
        """The weight of the last factor: what surrounds a layer asks for its type and device, never for its values."""
        return _weight(self[-1])


class TensorTrain(nn.Module):
    """A linear layer whose weight is a tensor train: a matrix product operator.

    `outputs` and `inputs` are the dimensions into which the rows and columns of the weight fall, `ranks` those between
    the cores. Core k is a linear layer from (rank before, input k) to (output k, rank behind), so that what quantizes
    or prunes linear layers works on it. Takes [..., inputs], gives [..., outputs]. Novikov et al., arXiv:1509.06569.
    """

    def __init__(self, outputs: Sequence[int], inputs: Sequence[int], ranks: Sequence[int], bias: bool = True):
        super().__init__()
        self.outputs, self.inputs, self.ranks = tuple(outputs), tuple(inputs), tuple(ranks)
        before, behind = (1, *self.ranks), (*self.ranks, 1)
        self.cores = nn.ModuleList(
            nn.Linear(before[k] * n, m * behind[k], bias=False) for k, (m, n) in enumerate(zip(outputs, inputs))
        )
        self.bias = nn.Parameter(torch.zeros(math.prod(outputs))) if bias else None

    @property
    def weight(self) -> Tensor:
        """The weight of the last core: what surrounds a layer asks for its type and device, never for its values."""
        return _weight(self.cores[-1])

    def forward(self, x: Tensor) -> Tensor:
        shape, made, rest, rank = x.shape[:-1], 1, math.prod(self.inputs), 1
        state = x.reshape(-1, rank, rest, made)
        for core, output, given, behind in zip(self.cores, self.outputs, self.inputs, (*self.ranks, 1)):
            rest //= given
            state = (
                state.reshape(-1, rank, given, rest, made).permute(0, 3, 4, 1, 2).reshape(-1, rest, made, rank * given)
            )
            state = core(state)
            state = state.reshape(-1, rest, made, output, behind).permute(0, 4, 1, 2, 3)
            rank, made = behind, made * output
            state = state.reshape(-1, rank, rest, made)
        result = state.reshape(*shape, made)
        return result if self.bias is None else result + self.bias


class TensorTrainEmbedding(nn.Module):
    """A table whose rows are looked up, stored as a tensor train.

    Row i, in the mixed base of `rows`, chooses a slice of each core; their product is the row. `rows` may stand for
    more than there are. Core k is a table of its own, [rows k, rank before * columns k * rank behind]. Takes integers
    [...], gives [..., columns]. Khrulkov et al., arXiv:1901.10787.
    """

    def __init__(self, rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]):
        super().__init__()
        self.rows, self.columns, self.ranks = tuple(rows), tuple(columns), tuple(ranks)
        before, behind = (1, *self.ranks), (*self.ranks, 1)
        self.cores = nn.ModuleList(
            nn.Embedding(v, before[k] * d * behind[k]) for k, (v, d) in enumerate(zip(rows, columns))
        )

    @property
    def weight(self) -> Tensor:
        """The weight of the last core: what surrounds a layer asks for its type and device, never for its values."""
        return _weight(self.cores[-1])

    def forward(self, indices: Tensor) -> Tensor:
        flat, base, rank = indices.reshape(-1), math.prod(self.rows), 1
        state = self.weight.new_ones(1, 1, 1)
        for core, row, column, behind in zip(self.cores, self.rows, self.columns, (*self.ranks, 1)):
            base //= row
            part = core(flat // base % row).reshape(-1, rank, column * behind)
            state = torch.matmul(state, part).reshape(len(flat), -1, behind)
            rank = behind
        return state.reshape(*indices.shape, math.prod(self.columns))


def _weight(module: nn.Module) -> Tensor:
    """A view of the weight of `module`: the parameter itself would seem to be shared by two layers."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
