"""The statistics against figures that are known, and against what their intervals promise."""

import numpy as np
import pytest
from scipy import stats

from featherweight.measure.statistics import mean_estimate, pooled_estimates, share_estimate, speedup


def test_mean_has_students_interval():
    values = [4.0, 5.0, 6.0, 9.0]
    found = mean_estimate(values)
    expected = stats.t.interval(0.95, 3, loc=6.0, scale=stats.sem(values))
    assert found == pytest.approx((6.0, *expected))


def test_one_value_has_no_width():
    assert mean_estimate([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(("yes", "count"), [(0, 50), (9, 10), (150, 150), (731, 1000)])
def test_share_has_wilsons_interval(yes: int, count: int):
    parts = np.array([1.0] * yes + [0.0] * (count - yes))
    expected = stats.binomtest(yes, count).proportion_ci(0.95, method="wilson")
    assert share_estimate(parts) == pytest.approx((yes / count, expected.low, expected.high), abs=1e-12)


def median(seconds: np.ndarray) -> np.ndarray:
    return np.array([np.median(seconds), seconds.mean()])


def test_pooled_figures_are_those_of_all_runs():
    generator = np.random.default_rng(0)
    loads = [generator.gamma(4, 1e-3, (12, runs)) for runs in (5, 7, 9)]
    every = np.concatenate([load.ravel() for load in loads])
    middle, mean = pooled_estimates(loads, median)
    assert middle.value == np.median(every)
    assert mean.value == pytest.approx(every.mean())
    assert middle.low < middle.value < middle.high


def test_pooled_interval_widens_with_what_runs_share():
    """Loads that differ make the interval as wide as their difference, however many runs each has."""
    generator = np.random.default_rng(1)
    alike = [generator.normal(1, 0.01, (20, 50)) for _ in range(5)]
    apart = [load + shift for load, shift in zip(alike, (-0.1, -0.05, 0, 0.05, 0.1))]
    widths = [
        estimate.high - estimate.low
        for estimate in (pooled_estimates(alike, median)[1], pooled_estimates(apart, median)[1])
    ]
    assert widths[1] > 10 * widths[0]
    assert widths[1] > 0.05


def drifting(factor: float, seed: int, load_effect: float = 0.0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Two subjects on a machine whose speed changes from round to round; the second takes 1/factor of the time."""
    generator = np.random.default_rng(seed)
    original, compressed = [], []
    for _ in range(5):
        speed = generator.uniform(1, 1.5, (12, 1))
        effect = np.exp(generator.normal(0, load_effect))
        original.append(speed * generator.gamma(400, 1 / 400, (12, 6)))
        compressed.append(speed * generator.gamma(400, 1 / 400, (12, 9)) * effect / factor)
    return original, compressed


def test_speedup_finds_a_known_factor_despite_a_drifting_machine():
    value, low, high = speedup(*drifting(1.8, 3))
    assert low < 1.8 < high
    assert value == pytest.approx(1.8, rel=0.02)
    assert high / low < 1.08


@pytest.mark.parametrize("load_effect", [0.0, 0.03])
def test_speedup_interval_holds_the_truth_as_often_as_it_says(load_effect: float):
    """99%, also where each load is a few percent faster or slower than the last."""
    intervals = [speedup(*drifting(1.0, seed, load_effect), resamples=300) for seed in range(200)]
    held = sum(low <= 1 <= high for _, low, high in intervals)
    assert held >= 193  # fewer than 193 of 200 has a probability of 0.001 at 99%, of 0.8 at 95%


def test_speedup_needs_the_same_rounds():
    with pytest.raises(ValueError):
        speedup([np.ones((3, 2))], [np.ones((3, 2)), np.ones((3, 2))])
