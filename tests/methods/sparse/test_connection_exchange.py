"""The exchange of connections: against Algorithm 1 of RigL written out in loops, and what always holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from featherweight.methods.sparse.exchange import decayed, exchange, random_mask


def plainly(keep: Tensor, weight: Tensor, growth: Tensor, count: int) -> Tensor:
    """Drop and grow, one connection at a time (arXiv:1911.11134, Algorithm 1)."""
    left = {place for place in range(len(keep)) if keep[place]}
    for _ in range(count):
        left.remove(min(left, key=lambda place: (float(weight[place].abs()), -place)))
    grown = set(left)
    for _ in range(count):
        grown.add(max((p for p in range(len(keep)) if p not in grown), key=lambda p: (float(growth[p]), -p)))
    return torch.tensor([place in grown for place in range(len(keep))])


@given(some.integers(1, 40), some.integers(0, 10**6), some.floats(0, 1), some.booleans())
@settings(max_examples=200, deadline=None)
def test_it_is_the_algorithm_of_the_paper(size: int, seed: int, share: float, ties: bool):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(size, generator=generator) < 0.5
    weight, growth = torch.randn(size, generator=generator), torch.rand(size, generator=generator)
    if ties:
        weight, growth = weight.round(), (3 * growth).round()
    count = int(share * int(keep.sum()))
    found = exchange(keep, weight, growth, count)
    assert torch.equal(found, plainly(keep, weight, growth, count))
    assert int(found.sum()) == int(keep.sum())


def test_the_smallest_go_and_the_steepest_come():
    keep = torch.tensor([[True, True, True], [False, False, False]])
    weight = torch.tensor([[3.0, -0.1, 2.0], [9.0, 9.0, 9.0]])
    growth = torch.tensor([[0.0, 0.1, 0.0], [0.5, 0.2, 0.9]])
    assert exchange(keep, weight, growth, 1).tolist() == [[True, False, True], [False, False, True]]


def test_a_connection_just_dropped_stays_where_its_gradient_is_the_steepest():
    keep = torch.tensor([True, True, False])
    assert torch.equal(exchange(keep, torch.tensor([1.0, 0.1, 0.0]), torch.tensor([0.0, 5.0, 1.0]), 1), keep)


def test_the_share_falls_on_a_cosine_to_nothing():
    shares = [decayed(0.3, t / 100, 0.75) for t in range(101)]
    assert shares[0] == 0.3 and shares == sorted(shares, reverse=True)
    assert decayed(0.3, 0.375, 0.75) == pytest.approx(0.15)
    assert decayed(0.3, 0.25, 0.75) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    assert set(shares[75:]) == {0.0}


def test_a_random_mask_keeps_as_many_as_asked_anywhere():
    generator = torch.Generator().manual_seed(0)
    found = [random_mask((5, 4), 7, generator) for _ in range(2000)]
    assert all(int(mask.sum()) == 7 for mask in found)
    assert torch.stack(found).float().mean(0) == pytest.approx(torch.full((5, 4), 0.35).numpy(), abs=0.06)
