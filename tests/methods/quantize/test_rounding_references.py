"""Each way of rounding equals its own slow, plain reference: float64, one number at a time, written from the paper."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.methods.quantize.awq import search_scales
from featherweight.methods.quantize.gptq import (
    best_of,
    damped,
    factors,
    gptq,
    in_order,
    loss,
    refitted,
    sloped,
    sorted_order,
)
from featherweight.methods.quantize.grids import (
    LEAST,
    NF4,
    affine_by_range,
    centred_by_range,
    clipped,
    grouped_error,
    rescaled,
    symmetric_by_range,
    table_by_range,
    ternary_by_range,
)
from featherweight.methods.quantize.hqq import half_quadratic
from featherweight.model.matrices import fitting_group

SEEDS = st.integers(0, 10_000)
MAKERS = {
    "affine4": lambda w, g: affine_by_range(w, g, 4),
    "affine2": lambda w, g: affine_by_range(w, g, 2),
    "symmetric3": lambda w, g: symmetric_by_range(w, g, 3),
    "centred2": lambda w, g: centred_by_range(w, g, 2),
    "centred1": lambda w, g: centred_by_range(w, g, 1),
    "ternary": ternary_by_range,
    "nf4": lambda w, g: table_by_range(w, g, NF4),
}
ANY_GRID = st.sampled_from(sorted(MAKERS))


def matrix(seed: int, rows: int = 3, columns: int = 8) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed: int, columns: int = 8, rows: int = 40) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed + 1)
    mix = torch.randn(columns, columns, generator=random, dtype=torch.float64)
    inputs = torch.randn(rows, columns, generator=random, dtype=torch.float64) @ mix
    return inputs.t() @ inputs / rows


def points_of(grid, row: int, group: int) -> list[float]:
    """Every point of one group's grid, from the lowest integer to the highest."""
    scale, zero = float(grid.scale[row, group]), float(grid.zeros()[row, group])
    if grid.table is not None:
        return [float(entry) * scale for entry in grid.table]
    return [(integer - zero) * scale for integer in range(grid.low, grid.high + 1)]


def closest(value: float, points: list[float]) -> int:
    return min(range(len(points)), key=lambda place: abs(points[place] - value))


# -- rounding to nearest ----------------------------------------------------------------------------------------------
@given(seed=SEEDS, kind=ANY_GRID)
@settings(max_examples=60, deadline=None)
def test_rounding_to_nearest_takes_the_nearest_point(seed, kind):
    weight = matrix(seed)
    grid = MAKERS[kind](weight, 4)
    integers = grid.nearest(weight)
    assert grid.low <= integers.min() and integers.max() <= grid.high
    for row, column in itertools.product(range(3), range(8)):
        points = points_of(grid, row, column // 4)
        wanted = points[closest(float(weight[row, column]), points)]
        assert float(grid.points(integers)[row, column]) == pytest.approx(wanted, abs=1e-12)


@given(seed=SEEDS, bits=st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_the_affine_grid_is_that_of_the_paper(seed, bits):
    """arXiv:1712.05877, section 3.1: range with 0 in it, scale = range / steps, zero point rounded."""
    weight = matrix(seed, 2, 8)
    grid = affine_by_range(weight, 4, bits)
    for row, group in itertools.product(range(2), range(2)):
        values = [float(value) for value in weight[row, group * 4 : group * 4 + 4]]
        low, high = min(*values, 0.0), max(*values, 0.0)
        scale = max((high - low) / (2**bits - 1), LEAST)
        assert float(grid.scale[row, group]) == pytest.approx(scale, rel=1e-12)
        assert float(grid.zero[row, group]) == min(max(round(-low / scale), 0), 2**bits - 1)


@given(seed=SEEDS, kind=ANY_GRID)
@settings(max_examples=40, deadline=None)
def test_clipping_never_loses_and_is_the_best_of_its_candidates(seed, kind):
    weight, importance = matrix(seed), matrix(seed + 1, 1)[0].square()
    grid = MAKERS[kind](weight, 4)
    found = clipped(weight, grid, importance, candidates=15)
    after, before = (grouped_error(weight, each, importance) for each in (found, grid))
    assert (after <= before + 1e-12).all()
    for share in torch.linspace(1.0, 0.3, 15).tolist() if grid.high - grid.low < 15 else []:
        error = 0.0
        for column in range(4):
            points = [point * share for point in points_of(grid, 0, 0)]
            error += (
                float(importance[column]) * (points[closest(float(weight[0, column]), points)] - weight[0, column]) ** 2
            )
        assert float(after[0, 0]) <= error + 1e-9


def test_a_group_that_does_not_divide_takes_the_nearest_divisor():
    assert [fitting_group(64, 32), fitting_group(172, 32), fitting_group(9, 32), fitting_group(97, 32)] == [
        32,
        43,
        9,
        97,
    ]
    assert fitting_group(100, None) == 100


def test_a_group_of_zeros_stays_zero():
    weight = torch.zeros(2, 8)
    for kind in sorted(set(MAKERS) - {"centred1", "centred2"}):
        grid = clipped(weight, MAKERS[kind](weight, 4)).stored()
        assert (grid.points(grid.nearest(weight)) == 0).all(), kind
    for kind in ("centred1", "centred2"):
        grid = MAKERS[kind](weight, 4).stored()
        assert grid.points(grid.nearest(weight)).abs().max() < 1e-6


# -- HQQ --------------------------------------------------------------------------------------------------------------
def reference_hqq(values: list[float], scale: float, zero: float, top: int, turns: int) -> list[float]:
    """The zero point after each turn, for one group: alternate the proximal step and the mean."""
    power, beta, zeros = 0.7, 10.0, [zero]
    for _ in range(turns):
        integers = [min(max(float(round(value / scale + zero)), 0), top) for value in values]
        points = [(integer - zero) * scale for integer in integers]
        outliers = []
        for value, point in zip(values, points):
            size = abs(value - point)
            shrunk = max(0.0, size - max(size, 1e-12) ** (power - 1) / beta)
            outliers.append(math.copysign(shrunk, value - point))
        parts = [integer - (value - outlier) / scale for integer, value, outlier in zip(integers, values, outliers)]
        zero = sum(parts) / len(parts)
        zeros.append(zero)
        beta *= 1.01
    return zeros


@given(seed=SEEDS, bits=st.sampled_from([2, 3, 4]), turns=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_half_quadratic_zero_points_are_those_of_the_reference(seed, bits, turns):
    weight = matrix(seed, 1, 8)
    grid = affine_by_range(weight, 8, bits)
    found = half_quadratic(weight, grid, turns=turns)
    values = weight[0].tolist()
    zeros = reference_hqq(values, float(grid.scale), float(grid.zero), 2**bits - 1, turns)
    errors = []
    for zero in zeros:
        points = [(place - zero) * float(grid.scale) for place in range(2**bits)]
        errors.append(sum(abs(points[closest(value, points)] - value) for value in values) / 8)
    # It ends where the mean absolute error no longer falls; where it stays, rounding decides which side it takes.
    ends = [
        place
        for place in range(len(errors))
        if all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors[: place + 1]))
        and all(later >= errors[place] - 1e-9 for later in errors[place + 1 : place + 2])
    ]
    assert any(float(found.zero) == pytest.approx(zeros[place], rel=1e-6, abs=1e-6) for place in ends)


# -- GPTQ -------------------------------------------------------------------------------------------------------------
def reference_gptq(weight, grid, hessian, order):
    """Optimal brain quantization in a fixed order, arXiv:2210.17323, equations 2 and 3: after each column the rest is
    updated with the inverse Hessian of the columns that remain, which is inverted anew each time.
    """
    weight, rows = weight.clone(), len(weight)
    integers = torch.zeros_like(weight)
    for place, column in enumerate(order.tolist()):
        rest = order[place:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        for row in range(rows):
            points = points_of(grid, row, column // grid.group)
            best = closest(float(weight[row, column]), points)
            integers[row, column] = best + grid.low
            error = (weight[row, column] - points[best]) / inverse[0, 0]
            weight[row, rest] -= error * inverse[0]
    return integers


@given(seed=SEEDS, kind=ANY_GRID, act_order=st.booleans())
@settings(max_examples=60, deadline=None)
def test_gptq_is_optimal_brain_quantization_in_order(seed, kind, act_order):
    weight, hessian = matrix(seed), damped(moment(seed), 0.01)
    grid = MAKERS[kind](weight, 4)
    order = sorted_order(hessian) if act_order else torch.arange(8)
    found = gptq(weight, grid, hessian, order)
    assert found is not None
    assert torch.equal(found[0], reference_gptq(weight, grid, hessian, order))


@given(seed=SEEDS, kind=ANY_GRID, weighted=st.booleans())
@settings(max_examples=60, deadline=None)
def test_fitted_scales_are_of_least_squares_for_their_integers(seed, kind, weighted):
    weight = matrix(seed)
    importance = torch.rand(8, dtype=weight.dtype) + 0.1 if weighted else None
    grid = replace(MAKERS[kind](weight, 4), half=False)
    shares = torch.ones(8, dtype=weight.dtype) if importance is None else importance
    found = rescaled(weight, grid, importance, rounds=1)
    assert (grouped_error(weight, found, shares) <= grouped_error(weight, grid, shares)).all()
    for row, group in itertools.product(range(len(weight)), range(2)):
        cut = slice(4 * group, 4 * group + 4)
        zero = grid.zeros()[row, group]
        points = grid.unit(grid.round(weight[row, cut], grid.scale[row, group], zero), zero)
        if found.scale[row, group] != grid.scale[row, group]:
            least = torch.linalg.lstsq(
                (shares[cut].sqrt() * points)[:, None], (shares[cut].sqrt() * weight[row, cut])[:, None]
            ).solution
            assert torch.allclose(found.scale[row, group], least[0, 0], rtol=1e-6)


@given(seed=SEEDS, steps=st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_the_sorted_order_takes_the_least_conditional_variance_from_its_end(seed, steps):
    hessian = damped(moment(seed), 0.01).double()
    last: list[int] = []
    for step in range(8):
        known = hessian[last][:, last]
        rest = [
            float(hessian[at, at] - hessian[at, last] @ torch.linalg.solve(known, hessian[last, at])) for at in range(8)
        ]
        if step < steps:
            last.append(min((at for at in range(8) if at not in last), key=lambda at: rest[at]))
        else:
            break
    others = sorted((at for at in range(8) if at not in last), key=lambda at: -rest[at])
    if len(last) == 8:
        others = []
    assert sorted_order(hessian, steps).tolist() == [*others, *reversed(last)]


def test_few_inputs_are_rounded_better_in_sorted_order():
    """20 rows of inputs for 64 columns."""
    torch.manual_seed(0)
    inputs, weight = torch.randn(20, 64), torch.randn(32, 64)
    hessian = damped(inputs.t() @ inputs / 20, 0.01)
    grid = affine_by_range(weight, 32, 4)
    lost = []
    for steps in (0, 64):
        found = gptq(weight, grid, hessian, sorted_order(hessian, steps))
        assert found is not None
        lost.append(loss(weight, grid.points(found[0].float()), hessian))
    assert lost[1] < 0.97 * lost[0]


def test_blocks_of_columns_change_nothing():
    """150 columns are three blocks."""
    weight, hessian = matrix(1, 4, 150), damped(moment(1, 150, 400), 0.01)
    grid = affine_by_range(weight, 50, 3)
    found = gptq(weight, grid, hessian, sorted_order(hessian))
    assert found is not None and torch.equal(found[0], reference_gptq(weight, grid, hessian, sorted_order(hessian)))


def test_the_loss_is_the_sum_that_the_factors_promise():
    weight, hessian = matrix(2, 4, 12), moment(2, 12)
    unit, cost = factors(hessian)
    assert torch.allclose((unit * cost) @ unit.t(), hessian) and torch.equal(
        unit.tril(-1), torch.zeros(12, 12).double()
    )
    grid = affine_by_range(weight, 4, 3)
    error = weight - grid.points(in_order(weight, grid, unit, torch.arange(12))[0])
    assert loss(weight, weight - error, hessian) == pytest.approx(float(((error @ unit) ** 2 * cost).sum()))


def test_all_beginnings_kept_find_the_best_rounding_there_is():
    weight, hessian = matrix(3, 5, 6), moment(3, 6)
    grid = centred_by_range(weight, 3, 1)
    unit, cost = factors(hessian)
    found = best_of(weight, grid, unit, cost, torch.arange(6), width=64)
    for row in range(5):
        every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
        scale = grid.scale[row].repeat_interleave(3)
        errors = weight[row] - (every - 0.5) * scale
        losses = ((errors @ hessian) * errors).sum(1)
        assert torch.equal(found[row], every[losses.argmin()])


@given(seed=SEEDS, kind=ANY_GRID)
@settings(max_examples=25, deadline=None)
def test_one_beginning_is_plain_gptq_and_refitting_never_loses(seed, kind):
    weight, hessian = matrix(seed), damped(moment(seed), 0.05)
    grid, order = MAKERS[kind](weight, 4).stored(), sorted_order(hessian)
    unit, cost = factors(hessian[order][:, order])
    plain, left = in_order(weight, grid, unit, order)
    assert torch.equal(best_of(weight, grid, unit, cost, order, 1), plain)
    error = weight - grid.points(plain)
    assert torch.allclose((error[:, order] @ unit).t(), left, atol=1e-9)
    assert torch.allclose(error @ hessian, sloped(left, unit, cost, order), atol=1e-9)
    again, before, after = refitted(weight, grid, plain, hessian)
    assert torch.allclose(before.sum(), torch.tensor(loss(weight, grid.points(plain), hessian), dtype=before.dtype))
    assert torch.allclose(after.sum(), torch.tensor(loss(weight, again.points(plain), hessian), dtype=after.dtype))
    assert loss(weight, again.points(plain), hessian) <= loss(weight, grid.points(plain), hessian) * (1 + 1e-4) + 1e-9
    integers, final = gptq(weight, grid, hessian, order, rounds=2)
    assert loss(weight, final.points(integers), hessian) <= loss(weight, grid.points(plain), hessian) + 1e-9


def test_refitted_scales_solve_the_normal_equations():
    weight, hessian = matrix(5, 1, 8), moment(5)
    grid = symmetric_by_range(weight, 4, 3)
    integers = grid.nearest(weight)
    points = torch.zeros(2, 8, dtype=torch.float64)
    points[0, :4], points[1, 4:] = integers[0, :4], integers[0, 4:]
    wanted = torch.linalg.solve(points @ hessian @ points.t(), points @ hessian @ weight[0])
    assert torch.allclose(refitted(weight, grid, integers, hessian)[0].scale[0], wanted, rtol=2e-3)  # float16


def test_beginnings_of_a_pruned_row_lose_no_more_than_one_and_keep_the_zeros():
    for seed in range(5):
        weight, hessian = matrix(seed, 6, 16), damped(moment(seed, 16), 0.01)
        keep = matrix(seed + 1, 6, 16) > 0
        grid, order = affine_by_range(weight * keep, 8, 3), sorted_order(hessian)
        unit, cost = factors(hessian[order][:, order])
        one, _ = in_order(weight * keep, grid, unit, order, keep)
        assert torch.equal(best_of(weight * keep, grid, unit, cost, order, 1, keep), one)
        many = best_of(weight * keep, grid, unit, cost, order, 16, keep)
        assert (grid.points(many)[~keep] == 0).all()
        assert loss(weight * keep, grid.points(many), hessian) <= loss(weight * keep, grid.points(one), hessian)


def test_pruned_weights_stay_zero_and_the_others_make_up_for_them():
    weight, hessian = matrix(6, 6, 16), damped(moment(6, 16), 0.01)
    keep = torch.rand(6, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    grid = affine_by_range(weight * keep, 8, 4)
    order = torch.arange(16)
    integers, _ = gptq(weight, grid, hessian, order, keep)
    assert (grid.points(integers)[~keep] == 0).all()
    masked = grid.points(grid.nearest(weight * keep))
    assert loss(weight, grid.points(integers), hessian) < loss(weight, masked, hessian)


def test_a_hessian_that_is_not_positive_definite_gives_nothing():
    hessian = torch.ones(8, 8, dtype=torch.float64)
    weight = matrix(7)
    assert factors(hessian) is None and factors(torch.full((4, 4), float("nan"))) is None
    assert gptq(weight, affine_by_range(weight, 4, 4), hessian, torch.arange(8)) is None
    assert factors(damped(hessian, 0.01)) is not None


# -- AWQ --------------------------------------------------------------------------------------------------------------
@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_awq_scales_are_the_best_of_the_grid_search(seed):
    """arXiv:2306.00978, equations 4 and 5, over the inputs themselves instead of their second moment."""
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(50, 8, generator=random, dtype=torch.float64) * torch.rand(8, generator=random).mul(3).exp()
    weight, size = matrix(seed, 4), inputs.abs().mean(0)

    def rounded(scaled, importance):
        grid = affine_by_range(scaled, 4, 3)
        return grid.points(grid.nearest(scaled))

    losses = []
    for step in range(20):
        scales = [max(float(each), 1e-4) ** (step / 20) for each in size]
        middle = math.sqrt(max(scales) * min(scales))
        scales = torch.tensor([each / middle for each in scales], dtype=torch.float64)
        outputs = inputs @ (rounded(weight * scales, None) / scales).t()
        losses.append(float(((outputs - inputs @ weight.t()) ** 2).sum()))
    found, share = search_scales([weight], size, inputs.t() @ inputs, rounded)
    assert losses[round(share * 20)] == pytest.approx(min(losses), rel=1e-9)
    wanted = size.clamp_min(1e-4) ** share
    assert torch.allclose(found, wanted / (wanted.max() * wanted.min()).sqrt())
