"""How many units to keep, and what they are worth: the pure mathematics of pruning."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.methods.prune.patterns import keep_largest_of_all
from featherweight.methods.prune.plan import Limits, by_rank, by_share, limits
from featherweight.methods.prune.scores import cubic, l1, l2, relative, slices, taylor
from featherweight.model.masks import keep_largest


def test_a_step_changes_every_width_by_a_multiple():
    assert limits(64, 64, 0.1, 8, [1]) == Limits(units=64, least=7, step=8)
    assert limits(12, 12, 0.1, 8, [32]) == Limits(units=12, least=2, step=1)  # heads of 32: any number of them fits
    assert limits(64, 64, 0.1, 8, [1, 4]).step == 8
    assert limits(64, 64, 0.1, 8, [4]).step == 2


def test_a_step_fits_all_widths_at_once():
    assert limits(60, 60, 0.0, 12, [4, 3]).step == 12  # 3 units for the one, 4 for the other


def test_a_group_with_fewer_than_two_steps_gives_up_single_units():
    assert limits(15, 15, 0.1, 8, [1]).step == 1
    assert limits(16, 16, 0.1, 8, [1]).step == 8


def test_a_group_that_earlier_rounds_cut_keeps_its_step_and_its_least_share():
    assert limits(8, 64, 0.1, 8, [1]) == Limits(units=8, least=7, step=8)
    assert limits(8, 64, 0.1, 8, [1]).allowed(3) == 8
    assert limits(8, 64, 0.25, 1, [1]) == Limits(units=8, least=8, step=1)


@pytest.mark.parametrize(("wanted", "kept"), [(64, 64), (63, 64), (59, 56), (60, 64), (3, 8), (0, 8), (100, 64)])
def test_allowed_is_the_nearest_multiple(wanted: int, kept: int):
    assert Limits(units=64, least=7, step=8).allowed(wanted) == kept


def test_a_width_that_is_no_multiple_stays_or_becomes_one():
    bound = Limits(units=62, least=1, step=8)
    assert {bound.allowed(wanted) for wanted in range(63)} == {8, 16, 24, 32, 40, 48, 56, 62}


def price(widths: list[int]):
    """A chain of layers: the products of neighbouring widths."""
    return lambda kept: float(sum(a * b for a, b in zip([3, *kept], [*kept, 10], strict=True)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(4, 40), min_size=1, max_size=6),
    st.floats(0.2, 0.95),
    st.sampled_from([1, 4, 8]),
    st.integers(0, 2**31),
    st.booleans(),
)
def test_the_price_is_met_and_no_step_more_would_fit(
    units: list[int], share: float, multiple: int, seed: int, rank: bool
):
    cost = price(units)
    bounds = [limits(count, count, 0.1, multiple, [1]) for count in units]
    target = share * cost(units)
    scores = [np.random.default_rng(seed + place).random(count) for place, count in enumerate(units)]
    kept = by_rank(scores, bounds, cost, target) if rank else by_share(bounds, cost, target)
    least = [bound.allowed(0) for bound in bounds]
    if cost(least) > target:
        assert list(kept) == least
        return
    assert cost(kept) <= target
    for place, bound in enumerate(bounds):
        assert bound.least <= kept[place] <= bound.units
        assert kept[place] == bound.units or kept[place] % bound.step == 0
        more = kept.copy()
        more[place] = min(bound.units, kept[place] + bound.step)
        assert kept[place] == bound.units or cost(more) > target


def test_the_group_with_the_lower_scores_gives_more():
    bounds = [limits(10, 10, 0.1, 1, [1])] * 2
    low, high = np.linspace(0, 1, 10), np.linspace(10, 11, 10)
    assert list(by_rank([low, high], bounds, lambda kept: float(sum(kept)), 12)) == [2, 10]
    assert list(by_share(bounds, lambda kept: float(sum(kept)), 12)) == [6, 6]


def test_slices_collect_what_belongs_to_a_unit():
    weight = torch.arange(24.0).reshape(2, 6, 2)
    rows = slices(weight, 1, torch.tensor([[0, 3], [1, 4], [2, 5]]))
    assert rows.shape == (3, 8)
    assert sorted(rows[1].tolist()) == [2, 3, 8, 9, 14, 15, 20, 21]


def test_scores_by_hand():
    weights = torch.tensor([[3.0, -4.0], [0.0, 1.0]])
    assert l1(weights).tolist() == [7, 1]
    assert l2(weights).tolist() == [25, 1]
    assert taylor(weights, torch.tensor([[1.0, 1.0], [5.0, -2.0]])).tolist() == [1, 4]
    assert relative(torch.tensor([1.0, 3.0])).tolist() == [0.5, 1.5]
    assert relative(torch.zeros(2)).tolist() == [1, 1]


def test_taylor_is_the_change_of_a_linear_loss():
    """For a loss that is linear in the weights the first-order estimate is exact."""
    weights, slope = torch.randn(4, 5), torch.randn(4, 5)
    whole = (weights * slope).sum()
    for row in range(4):
        silent = weights.clone()
        silent[row] = 0
        assert torch.isclose(taylor(weights, slope)[row], ((silent * slope).sum() - whole) ** 2, rtol=1e-4, atol=1e-6)


def test_cubic_starts_and_ends_where_it_should():
    assert cubic(0.9, 0.0, 0.2) == pytest.approx(0.2)
    assert cubic(0.9, 1.0, 0.2) == pytest.approx(0.9)
    assert cubic(0.9, 2.0, 0.2) == pytest.approx(0.9)
    assert cubic(0.8, 0.5) == pytest.approx(0.8 * (1 - 0.5**3))  # arXiv:1710.01878, equation 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.floats(0.02, 0.98), st.floats(0, 0.3))
def test_masks_keep_exactly_the_share(sizes: list[int], share: float, least: float):
    scores = [torch.randn(size).abs() for size in sizes]
    masks = keep_largest_of_all(scores, share, least)
    floors = [max(1, round(min(least, share) * size)) for size in sizes]
    assert abs(sum(int(mask.sum()) for mask in masks) - max(share * sum(sizes), sum(floors))) <= 0.5 + 1e-9
    for score, mask, floor in zip(scores, masks, floors, strict=True):
        assert int(mask.sum()) >= floor
        if 0 < int(mask.sum()) < mask.numel():
            assert score[mask].min() >= score[~mask].max()


def test_of_equal_scores_the_first_are_kept():
    assert keep_largest(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]
