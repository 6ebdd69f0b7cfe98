"""The choice among candidates: the bar, ties within noise, the nearest, the front."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.core.run import Budget
from featherweight.search.choose import (
    Figures,
    choose,
    contenders,
    distance,
    excess,
    front,
    meets,
    surely_meets,
    too_small,
)

BAR = Budget(objective="latency", max_drop=0.5)


def figures(
    latency: float = 1.0, size: int = 1000, drop: float = 0.0, high: float | None = None, **rest: float
) -> Figures:
    high = drop + 0.1 if high is None else high
    return Figures(accuracy=90 - drop, drop=drop, drop_high=high, bytes=size, latency_ms=latency, **rest)


def test_the_fastest_of_those_that_surely_meet_the_bar() -> None:
    tried = {0: figures(latency=1.0), 1: figures(latency=0.5), 2: figures(latency=0.2, drop=0.45, high=0.8)}
    assert meets(tried[2], BAR) and not surely_meets(tried[2], BAR)
    assert choose(tried, BAR) == 1


def test_point_estimates_decide_where_none_is_sure() -> None:
    assert choose({0: figures(latency=1.0, drop=0.4, high=0.7), 1: figures(latency=0.5, drop=0.3, high=0.75)}, BAR) == 1


def test_point_estimates_decide_where_the_split_is_too_small_to_tell() -> None:
    tried = {0: figures(latency=1.0, high=0.0), 1: figures(latency=0.5, drop=0.3, high=1.3)}
    assert too_small(tried, BAR)
    assert choose(tried, BAR) == 1
    assert not too_small({0: figures(high=0.0)}, BAR)


def test_latencies_within_noise_are_tied_and_the_smaller_file_wins() -> None:
    tried = {0: figures(latency=1.0, size=1000), 1: figures(latency=1.02, size=900), 2: figures(latency=1.5, size=100)}
    assert choose(tried, BAR) == 1
    noisy = {
        0: figures(latency=1.0, latency_noise=0.5),
        1: figures(latency=1.09, size=900),
        2: figures(latency=1.2, size=1),
    }
    assert choose(noisy, BAR) == 1  # however noisy, ties are no wider than 10%


def test_only_what_is_near_the_fastest_is_run_side_by_side() -> None:
    tried = {
        0: figures(latency=1.0),
        1: figures(latency=1.09),
        2: figures(latency=1.2),
        3: figures(latency=0.5, drop=3),
    }
    assert contenders(tried, BAR) == [0, 1]
    assert contenders({place: figures(latency=1 + place / 100) for place in range(9)}, BAR) == [0, 1, 2]
    assert contenders({0: figures(drop=3)}, BAR) == []


def test_equal_files_are_told_apart_by_the_drop_and_then_by_order() -> None:
    assert choose({0: figures(drop=0.2), 1: figures(drop=0.1), 2: figures(drop=0.1)}, BAR) == 1


def test_sizes_are_compared_as_they_are() -> None:
    tried = {0: figures(size=1000, latency=0.1), 1: figures(size=999, latency=9.0)}
    assert choose(tried, Budget(objective="size", max_drop=0.5)) == 1


@pytest.mark.parametrize(("objective", "best"), [("latency", 0), ("size", 1), ("energy", 2), ("accuracy", 3)])
def test_every_objective(objective: str, best: int) -> None:
    tried = {
        0: figures(latency=0.1, energy_mj=5),
        1: figures(size=10, energy_mj=5),
        2: figures(energy_mj=1),
        3: figures(drop=-1.0, energy_mj=5),
    }
    assert choose(tried, Budget(objective=objective, max_drop=0.5)) == best


def test_energy_must_have_been_measured() -> None:
    with pytest.raises(ValueError, match="energy"):
        choose({0: figures()}, Budget(objective="energy"))


def test_the_nearest_if_none_meets_the_bar() -> None:
    budget = Budget(objective="size", max_drop=0.5, max_size=500)
    tried = {0: figures(size=2000, drop=0.0), 1: figures(size=490, drop=0.6), 2: figures(size=100, drop=9.0)}
    assert not any(meets(item, budget) for item in tried.values())
    assert choose(tried, budget) == 1


def test_each_limit_counts() -> None:
    budget = Budget(max_drop=0.5, max_size=1000, max_latency=2.0)
    over = excess(figures(latency=3.0, size=1100, drop=0.7), budget)
    assert over == pytest.approx({"drop": 0.2, "size": 0.1, "latency": 0.5})
    assert distance(figures(latency=3.0, size=1100, drop=0.7), budget) == pytest.approx(0.2 / 0.5 + 0.1 + 0.5)
    assert excess(figures(), Budget()) == {} and meets(figures(drop=50), Budget())


def test_the_front_holds_what_nothing_else_equals_or_betters() -> None:
    tried = {
        0: figures(latency=1, size=10, drop=0),
        1: figures(latency=2, size=5, drop=0),
        2: figures(latency=2, size=10, drop=0),
        3: figures(latency=9, size=99, drop=-1),
        4: figures(latency=1, size=10, drop=0),
    }
    assert front(tried) == {0, 1, 3, 4}


POINTS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=8)


@settings(deadline=None)  # a busy machine is no failure
@given(POINTS)
def test_every_candidate_off_the_front_is_beaten_by_one_on_it(points: list[tuple[int, int, int]]) -> None:
    tried = {place: figures(latency=a, size=b, drop=c) for place, (a, b, c) in enumerate(points)}
    best = front(tried)
    assert best
    for number, (latency, size, drop) in enumerate(points):
        beaten = any(
            points[other] != points[number]
            and points[other][0] <= latency
            and points[other][1] <= size
            and points[other][2] <= drop
            for other in best
        )
        assert beaten != (number in best)


@settings(deadline=None)  # a busy machine is no failure
@given(POINTS)
def test_the_choice_meets_the_bar_if_any_candidate_does(points: list[tuple[int, int, int]]) -> None:
    tried = {place: figures(latency=a, size=b, drop=c) for place, (a, b, c) in enumerate(points)}
    budget = Budget(objective="size", max_drop=1.0, max_size=2)
    assert meets(tried[choose(tried, budget)], budget) == any(meets(item, budget) for item in tried.values())
