"""Scales and zero points: against first principles and brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featherweight.methods.quantize.arithmetic import (
    affine_of_range,
    largest,
    rounding_error,
    scale_by_error,
    scale_by_max,
)

FINITE = st.floats(-1e6, 1e6, width=32)


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_largest_weight_is_the_highest_integer(axis, bits):
    weight = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    scale = scale_by_max(weight, axis, bits)
    assert scale.shape == (() if axis is None else (weight.shape[axis],))
    assert torch.allclose(scale * (2 ** (bits - 1) - 1), largest(weight, axis))


def test_dead_channels_get_a_scale_that_others_have():
    weight = torch.tensor([[0.0, 0.0], [1.27, -0.5], [0.1, 0.2]])
    assert torch.allclose(scale_by_max(weight, 0), torch.tensor([0.01, 0.01, 0.2 / 127]))
    assert scale_by_max(torch.zeros(3, 2), 0).tolist() == scale_by_max(torch.zeros(3, 2), 0).abs().tolist()
    assert (scale_by_max(torch.zeros(3, 2), 0) > 0).all() and scale_by_max(torch.zeros(3), None) > 0
    assert (scale_by_error(torch.zeros(3, 2), 0) > 0).all()


def test_the_error_is_that_of_the_rounded_values():
    weight, scale = torch.tensor([[0.4, 1.6, 100.0], [0.0, -3.0, 2.0]]), torch.tensor([1.0, 2.0])
    # with 4 bits, -7 to 7: first row 0, 2, 7; second 0, -4 (half to even), 2
    assert torch.allclose(rounding_error(weight, scale, 0, 4), torch.tensor([0.16 + 0.16 + 93**2, 0 + 1 + 0]) / 3)


@given(st.integers(0, 10_000), st.sampled_from([3, 4, 8]))
def test_the_searched_scale_is_never_worse_than_the_full_one(seed, bits):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(seed))
    weight[:, 0] *= 5  # outliers, which a shorter range would rather cut off
    full, searched = scale_by_max(weight, 0, bits), scale_by_error(weight, 0, bits)
    assert (rounding_error(weight, searched, 0, bits) <= rounding_error(weight, full, 0, bits)).all()
    assert (searched <= full).all() and (searched >= 0.39 * full).all()


def test_the_searched_scale_is_the_best_of_a_fine_search():
    weight = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    found = rounding_error(weight, scale_by_error(weight, None, 4), None, 4)
    fine = torch.linspace(0.4, 1, 3000) * scale_by_max(weight, None, 4)
    best = min(float(rounding_error(weight, scale, None, 4)) for scale in fine[::10])
    assert float(found) <= best * 1.02
    assert float(found) < 0.8 * float(rounding_error(weight, scale_by_max(weight, None, 4), None, 4))


@given(FINITE, FINITE)
def test_an_affine_grid_covers_its_range_and_holds_zero(one, other):
    low, high = min(one, other), max(one, other)
    scale, zero = affine_of_range(low, high)
    assert scale > 0 and 0 <= zero <= 255
    if max(high, 0) - min(low, 0) > 1e-30:
        assert (0 - zero) * scale <= low + scale and (255 - zero) * scale >= high - scale


@pytest.mark.parametrize(("low", "high"), [(0.0, float("inf")), (float("nan"), 1.0), (2.0, 1.0)])
def test_no_range_is_refused(low, high):
    with pytest.raises(ValueError, match="no finite range"):
        affine_of_range(low, high)
