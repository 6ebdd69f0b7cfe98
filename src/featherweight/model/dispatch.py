"""How tokens get to their experts and back: pure functions on tensors, and the operator that cuts rows by counts.

`n` tokens have `k` choices each; a choice is one row of what the experts compute, numbered by rank first: row
`choice * n + token`, so that all first choices come before all second ones (GShard, arXiv:2006.16668).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARTS = 1000  # a capacity factor counts in thousandths, so that its product with a free size is exact


@torch.library.custom_op("featherweight::split_rows", mutates_args=())
def split_rows(x: Tensor, counts: Tensor) -> list[Tensor]:
    """Rows of `x` [rows, ...] in order: `counts[0]` of them, then `counts[1]`, ...; `counts` adds up to all rows.

    The sizes are known at run time only. One ONNX operator: Split.
    """
    return [part.clone() for part in torch.split(x, counts.tolist())]


@split_rows.register_fake
def _(x: Tensor, counts: Tensor) -> list[Tensor]:
    ctx = torch.library.get_ctx()
    return [x.new_empty(ctx.new_dynamic_size(), *x.shape[1:]) for _ in range(counts.shape[0])]


split_rows.register_autograd(lambda ctx, gradients: (torch.cat(gradients), None))


@dataclass(frozen=True)
class Dispatch:
    """Which tokens the rows of all experts come from, expert by expert, and where each choice finds its row.

    `tokens` [rows] names the token of each row, `counts` [experts] how many rows each expert gets, `places` [k, n] the
    row of each choice: the number of rows (one past the last) where it was dropped.
    """

    tokens: Tensor
    counts: Tensor
    places: Tensor


def capacity_of(tokens: int, choices: int, experts: int, factor: float) -> int:
    """How many rows each expert takes at most: `factor` times its even share, rounded up (arXiv:2101.03961)."""
    share = PARTS * experts
    return (tokens * choices * round(factor * PARTS) + share - 1) // share


def dispatch(indices: Tensor, experts: int, factor: float | None = None) -> Dispatch:
    """The rows of each expert for the choices `indices` [n, k].

    With a capacity `factor`, choices beyond an expert's capacity are dropped: later ranks first, then later tokens.
    """
    tokens, choices = indices.shape
    flat = indices.t().reshape(-1)
    rows = flat.shape[0]
    numbers = torch.arange(rows, device=flat.device)
    order = torch.sort(flat * rows + numbers).indices  # all keys differ, so that any sort gives this order
    counts = (flat[:, None] == torch.arange(experts, device=flat.device)).long().sum(0)
    if factor is not None:
        most = capacity_of(tokens, choices, experts, factor)
        starts = counts.cumsum(0) - counts
        kept = numbers - starts[flat[order]] < most
        order, counts = order[kept], counts.clamp(max=most)
        places = torch.full_like(flat, 0) + counts.sum()
    else:
        places = torch.zeros_like(flat)
    places = places.index_put((order,), torch.arange(order.shape[0], device=flat.device))
    owners = torch.arange(tokens, device=flat.device).repeat(choices)
    return Dispatch(owners[order], counts, places.view(choices, tokens))


def combine(outputs: Tensor, places: Tensor, weights: Tensor | None, dropped: bool) -> Tensor:
    """The sum over its choices of what each token got: `outputs` [rows, width], `places` [k, n], `weights` [n, k].

    Without `weights` all count once. Where choices may have been `dropped`, they add nothing. Weights of more precision
    than the outputs are used as they are, and the sum is rounded once.
    """
    kind = outputs.dtype
    if dropped:
        outputs = torch.cat([outputs, outputs.new_zeros(1, outputs.shape[1])])
    total: Any = None
    for choice in range(places.shape[0]):
        part = outputs[places[choice]]
        part = part if weights is None else part * weights[:, choice, None]
        total = part if total is None else total + part
    assert isinstance(total, Tensor)
    return total.to(kind)
