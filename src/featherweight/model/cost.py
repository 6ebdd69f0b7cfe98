"""What a network costs, as a function of how many units of each group of coupled dimensions it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .groups import Coupling, Indices
from .macs import FORMULAS
from .rules import Work


class Cost:
    """A sum of products of widths; a width is what is fixed of a dimension plus what the groups keep of it.

    Called with the number of units that each group keeps (one integer per group, in order) it gives the cost.
    """

    def __init__(self, coupling: Coupling, terms: Sequence[Work]):
        owner = np.full(coupling.component.max(initial=-1) + 2, len(coupling.groups))
        for place, group in enumerate(coupling.groups):
            owner[group.components] = place
        units = np.array([len(group) for group in coupling.groups] + [1])
        self.constants = np.array([term.constant for term in terms], dtype=np.float64)
        self.widths = np.ones((len(terms), max((len(term.factors) for term in terms), default=0)))
        self.shares = np.zeros((*self.widths.shape, len(coupling.groups)))
        for row, term in enumerate(terms):
            for column, labels in enumerate(term.factors):
                counts = np.bincount(owner[coupling.component[labels]], minlength=len(units))
                self.widths[row, column] = counts[-1]
                self.shares[row, column] = counts[:-1] / units[:-1]

    def __call__(self, kept: Sequence[float] | NDArray[Any]) -> float:
        widths = self.widths + self.shares @ np.asarray(kept, dtype=np.float64)
        return float((self.constants * widths.prod(axis=1)).sum())


def parameters(coupling: Coupling) -> Cost:
    """The number of parameters, each counted once."""
    terms = []
    for name in sorted(coupling.parameters):
        shape = coupling.shapes[name]
        cut: dict[int, Indices] = {
            dim: coupling.dims[name, dim] for dim in range(len(shape)) if (name, dim) in coupling.dims
        }
        terms.append(Work(prod(size for dim, size in enumerate(shape) if dim not in cut), tuple(cut.values())))
    return Cost(coupling, terms)


def macs(coupling: Coupling) -> Cost:
    """Multiply-accumulates of all linear layers, convolutions, matrix products and attentions, on the example that
    was traced.
    """
    return Cost(coupling, coupling.works)


@torch.no_grad()
def forward_macs(model: nn.Module, example: Mapping[str, Tensor]) -> float:
    """Multiply-accumulates of one run of `model` on `example`, counted while it runs."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer of torch's own transformers
    try:
        with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
            model(**example)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2
