"""Interleaving: what is called when, and what is counted."""

import gc
import time
from collections.abc import Callable

import numpy as np
import pytest

from featherweight.measure.timing import interleave, repeat, runs_in_block, warm_up


def sleeper(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def test_rounds_of_one_moment_stand_in_one_row():
    samples = interleave({"slow": sleeper(0.004), "fast": sleeper(0.001)}, seconds=0.3, block=0.01)
    assert len(samples["slow"]) == len(samples["fast"]) >= 3
    assert samples["fast"].shape[1] > samples["slow"].shape[1]  # the same share of the time, so more runs
    assert np.median(samples["slow"]) >= 0.004
    assert 1.5 < np.median(samples["slow"]) / np.median(samples["fast"]) < 5


def test_every_round_calls_everybody_in_an_order_of_its_own():
    called: list[str] = []
    calls = {name: (lambda name=name: (called.append(name), time.sleep(0.01))) for name in "abc"}
    samples = interleave(calls, seconds=0.05, min_rounds=6, max_rounds=6, block=0, seed=1)
    assert {rows.shape for rows in samples.values()} == {(6, 1)}
    timed = called[-36::2]  # each timed run follows an untimed one
    rounds = [tuple(timed[place : place + 3]) for place in range(0, 18, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1


def test_one_run_before_each_block_is_not_counted():
    count = 0

    def call() -> None:
        nonlocal count
        count += 1
        time.sleep(0.001)

    cost = warm_up(call, limit=0.05)
    assert cost >= 0.001
    warm, count = count, 0
    samples = interleave({"a": call}, seconds=0.1, min_rounds=5, max_rounds=5)["a"]
    assert samples.shape[0] == 5 and samples.shape[1] > 1
    assert count >= samples.size + 5
    assert warm >= 2


def test_slow_calls_still_get_the_fewest_rounds():
    samples = interleave({"a": sleeper(0.02)}, seconds=0.01, min_rounds=4)["a"]
    assert samples.shape == (4, 1)


def test_warm_up_waits_until_calls_are_fast():
    left = 12

    def call() -> None:
        nonlocal left
        left = max(0, left - 1)
        time.sleep(0.001 + 0.002 * left)

    assert warm_up(call, limit=5.0) < 0.003
    assert left == 0


def test_warm_up_ends_at_its_limit():
    start = time.perf_counter()
    warm_up(sleeper(0.02), limit=0.01)
    assert time.perf_counter() - start < 0.5


def test_the_garbage_collector_rests_and_is_put_back():
    seen: list[bool] = []
    interleave({"a": lambda: seen.append(gc.isenabled())}, seconds=0.01, min_rounds=2)
    assert not any(seen)
    assert gc.isenabled()
    gc.disable()
    try:
        interleave({"a": lambda: None}, seconds=0.01, min_rounds=2)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_is_put_back_when_a_call_fails():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0})
    assert gc.isenabled()


def test_nothing_to_time_is_an_error():
    with pytest.raises(ValueError, match="nothing to time"):
        interleave({})


@pytest.mark.parametrize(("cost", "block", "runs"), [(1.0, 0.1, 1), (0.01, 0.1, 10), (1e-9, 1.0, 20), (0.0, 1.0, 20)])
def test_runs_fill_the_block(cost: float, block: float, runs: int):
    assert runs_in_block(cost, block) == runs


def test_repeat_loads_afresh_each_time():
    loaded = 0

    def load() -> dict[str, Callable[[], None]]:
        nonlocal loaded
        loaded += 1
        return {"a": sleeper(0.001), "b": sleeper(0.001)}

    samples = repeat(load, loads=3, seconds=0.15, max_rounds=4)
    assert loaded == 3
    assert [len(rows) for rows in samples["a"]] == [len(rows) for rows in samples["b"]]
    assert len(samples["a"]) == 3
    assert all(3 <= len(rows) <= 4 for rows in samples["a"])


def test_time_of_the_processor_leaves_waiting_out():
    samples = interleave({"a": sleeper(0.01)}, seconds=0.05, min_rounds=3, clock=time.thread_time_ns)["a"]
    assert 0 <= samples.max() < 0.005
