"""How dense each layer is: against the rule solved by bisection, and what holds for any shapes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from featherweight.methods.sparse.allocation import Size, counts, erdos_renyi_kernel, uniform

matrices = some.tuples(some.integers(1, 300), some.integers(1, 300))
kernels = some.tuples(some.integers(1, 64), some.integers(1, 64), some.integers(1, 5), some.integers(1, 5))
networks = some.lists(matrices | kernels, min_size=1, max_size=8)


def by_bisection(shapes: list[Size], density: float) -> list[float]:
    """The scale at which min(1, scale * sum of dimensions / their product) leaves `density` of all weights."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    low, high = 0.0, 1 / min(raw)
    for _ in range(200):
        scale = (low + high) / 2
        kept = sum(min(1.0, scale * each) * size for each, size in zip(raw, sizes))
        low, high = (scale, high) if kept < density * sum(sizes) else (low, scale)
    return [min(1.0, high * each) for each in raw]


@given(networks, some.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_it_is_the_rule_of_the_paper(shapes: list[Size], density: float):
    assert erdos_renyi_kernel(shapes, density) == pytest.approx(by_bisection(shapes, density), rel=1e-6)


@given(networks, some.floats(0.01, 0.99))
@settings(max_examples=200, deadline=None)
def test_all_layers_together_keep_what_was_asked(shapes: list[Size], density: float):
    for spread in (uniform, erdos_renyi_kernel):
        found = counts(shapes, spread(shapes, density))
        assert all(1 <= count <= math.prod(shape) for count, shape in zip(found, shapes))
        assert abs(sum(found) - density * sum(map(math.prod, shapes))) <= len(shapes)


def test_small_layers_stay_denser():
    """The figures of one linear network by hand: (100 + 10) / 1000 and (10 + 10) / 100 in proportion."""
    found = erdos_renyi_kernel([(100, 10), (10, 10)], 0.1)
    assert found[1] / found[0] == pytest.approx((20 / 100) / (110 / 1000))
    assert found[0] * 1000 + found[1] * 100 == pytest.approx(110)


def test_a_layer_that_is_too_small_for_its_share_stays_dense_and_the_others_share_the_rest():
    found = erdos_renyi_kernel([(16, 1, 3, 3), (64, 64, 3, 3)], 0.1)
    assert found[0] == 1.0
    assert found[0] * 144 + found[1] * 36864 == pytest.approx(0.1 * (144 + 36864))
