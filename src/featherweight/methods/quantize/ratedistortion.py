"""Integers of least bits for an error in the outputs: steps from sensitivities, rounding with feedback. Pure functions.

The loss of a rounded matrix is `sum_i share_i e_i H e_i^T` with rows `e_i` of the error, H the second moment of the
inputs (weighted by what the outputs react with) and `share_i` of row i in that reaction. With `H = U diag(d) U^T` and
feedback of the error, an entry adds `share_i d_j e_ij^2`; for uniform steps and an entropy coder the bits are least
where all entries add the same (reverse water-filling), so the steps are `spread / sqrt(share_i d_j)`. Uniform steps
are at most 0.255 bit from the bound at high rates (Gish and Pierce, 1968); the feedback is that of `gptq`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from featherweight.core.scaled import EXPONENTS, OCTAVE

BLOCK = 64
LARGEST = 2**15 - 1


def exponents(steps: Tensor) -> tuple[Tensor, float]:
    """Steps (positive) in whole quarter octaves above the least of them, and that least step: uint8, and a float."""
    places = torch.round(steps.double().log2() * OCTAVE)
    least = float(places.max()) - EXPONENTS + 1
    places = places.clamp_min(least)
    base = float(places.min())
    return (places - base).to(torch.uint8), 2.0 ** (base / OCTAVE)


def shared(cost: Tensor, channels: int) -> Tensor:
    """The geometric mean of the costs of each input channel: [channels] of [channels * kernel]."""
    return cost.double().log().reshape(channels, -1).mean(1).exp()


def rounded(
    weight: Tensor, rows: Tensor, columns: Tensor, unit: Tensor, order: Tensor, rate: float, keep: Tensor | None
) -> Tensor:
    """Integers (floats, [rows, columns]) with steps `rows[i] * columns[j]`, column by column in `order`.

    `unit` is U of `factors` for the Hessian in that order: each column makes up for the errors of those before it.
    With `rate` above 0, a second pass rounds towards 0 where `error^2 + rate * bits` falls by it (error in steps, bits
    by the frequencies of the first pass). Where `keep` is False the integer is 0.
    """
    found = _pass(weight, rows, columns, unit, order, None, keep)
    return found if rate == 0 else _pass(weight, rows, columns, unit, order, rate * code_lengths(found), keep)


def code_lengths(integers: Tensor) -> Tensor:
    """The bits of each integer from -n to n by its frequency; n is one more than the largest magnitude."""
    reach = int(integers.abs().max()) + 1
    counts = torch.bincount((integers.long() + reach).flatten(), minlength=2 * reach + 1).float() + 0.5
    return -(counts / counts.sum()).log2()


def _pass(
    weight: Tensor,
    rows: Tensor,
    columns: Tensor,
    unit: Tensor,
    order: Tensor,
    prices: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    wanted, steps = weight.t().contiguous()[order], columns[order]
    holes = None if keep is None else ~keep.t()[order]
    error, found = torch.zeros_like(wanted), torch.empty_like(wanted)
    for start in range(0, len(wanted), BLOCK):
        end = min(start + BLOCK, len(wanted))
        given = wanted[start:end] + unit[:start, start:end].t() @ error[:start]
        for place in range(start, end):
            target = given[place - start]
            if place > start:
                target = torch.addmv(target, error[start:place].t(), unit[start:place, place])
            step = rows * steps[place]
            integers = _nearest(target / step, prices)
            if holes is not None:
                integers = integers.masked_fill(holes[place], 0)
            found[place] = integers
            error[place] = wanted[place] - integers * step
    return found[torch.argsort(order)].t().contiguous()


def _nearest(values: Tensor, prices: Tensor | None) -> Tensor:
    """The nearest integer, or the one before it on the way to 0 where that costs less in error and bits together."""
    nearest = values.round().clamp_(-LARGEST, LARGEST)
    if prices is None:
        return nearest
    lower, reach = nearest - nearest.sign(), len(prices) // 2

    def cost(integers: Tensor) -> Tensor:
        return (values - integers).square() + prices[(integers.clamp(-reach, reach) + reach).long()]

    return torch.where(cost(lower) < cost(nearest), lower, nearest)


def on_grid(values: Tensor, digits: int) -> Tensor:
    """Floats rounded to multiples of a power of two, with about `digits` binary digits below their mean size."""
    size = float(values.double().square().mean().sqrt())
    if size == 0:
        return values
    step = 2.0 ** (torch.tensor(size).log2().floor().item() - digits)
    return (values.double() / step).round().mul(step).to(values.dtype)


def to_digits(values: Tensor, sizes: Tensor, digits: int) -> Tensor:
    """Floats rounded to `digits` binary digits below the size of each; where the size is 0 they stay as they are."""
    step = torch.exp2(sizes.double().log2().floor() - digits)
    return torch.where(sizes > 0, (values.double() / step).round() * step, values.double()).to(values.dtype)
