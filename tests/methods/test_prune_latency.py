"""Allocation by time: effective widths, the table, and pruning by what a target says that widths cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tasks import conv_task, one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.errors import NoEffect
from featherweight.core.step import step
from featherweight.methods.prune.latency import Latency, effective, table, widths_to_measure
from featherweight.methods.prune.plan import Limits
from featherweight.model.cost import forward_macs, macs
from featherweight.model.groups import couple

CPU = torch.device("cpu")


@given(st.floats(0.01, 1), st.integers(1, 3), st.floats(0, 5))
def test_the_effective_width_costs_the_share(share: float, power: int, fixed: float):
    units = 40
    found = effective(lambda width: fixed + width**power, share, units)
    reachable = share * (fixed + units**power) >= fixed
    assert 0 <= found <= units
    if reachable:
        assert fixed + found**power == pytest.approx(share * (fixed + units**power), abs=1e-6)
    else:
        assert found == pytest.approx(0, abs=1e-9)


@given(st.integers(2, 200), st.integers(1, 32), st.integers(1, 5))
def test_widths_to_measure_are_allowed_and_hold_the_least_and_the_last(units: int, step_: int, most: int):
    bound = Limits(units, max(1, units // 10), step_)
    found = widths_to_measure(bound, most)
    allowed = {bound.allowed(count) for count in range(1, units)} - {units}
    assert len(found) == min(most, len(allowed)) and set(found) <= allowed
    if allowed:
        assert found[0] == min(allowed)
        assert most == 1 or found[-1] == max(allowed)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def test_the_table_gives_back_what_was_measured_and_products_of_narrow_widths():
    coupling = couple(mlp(), {"input": torch.randn(2, 4)})
    cost, units = macs(coupling), [len(group) for group in coupling.groups]
    assert units == [32, 16]
    tables = {0: table(cost, units, 0, {16: 0.8}), 1: table(cost, units, 1, {8: 0.4})}
    time = Latency(cost, units, 0.01, tables)
    assert time(np.array([32, 16])) == pytest.approx(0.01)
    assert time(np.array([16, 16])) == pytest.approx(0.008)
    assert time(np.array([32, 8])) == pytest.approx(0.004)
    effective_0, effective_1 = tables[0][1][1], tables[1][1][1]
    want = cost([effective_0, effective_1]) / cost(units) * 0.01
    assert time(np.array([16, 8])) == pytest.approx(want)


def test_a_wider_group_never_takes_less_and_none_takes_more_than_all():
    coupling = couple(mlp(), {"input": torch.randn(2, 4)})
    cost = macs(coupling)
    time = Latency(cost, [32, 16], 1.0, {0: table(cost, [32, 16], 0, {8: 0.9, 16: 0.7, 24: 1.3})})
    found = [time(np.array([width, 16])) for width in range(33)]
    assert all(one <= other + 1e-12 for one, other in pairwise(found))
    assert found[24] == pytest.approx(1.0) and found[8] == pytest.approx(0.7)


class Blocks:
    """A target whose kernels compute eight channels at a time, whatever is asked of them: time by rounded widths."""

    name = "eights"

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, models: Sequence[nn.Module]) -> list[float]:
        self.asked += len(models)
        return [sum(self.layer(module) for module in model.modules()) for model in models]

    def layer(self, module: Any) -> float:
        if isinstance(module, nn.Conv2d | nn.Linear):
            shape = module.weight.shape
            return float(-(-shape[0] // 8) * 8 * module.weight[0].numel())
        return 0.0


def test_pruning_by_time_reaches_the_share_on_the_target_and_says_what_it_measured():
    task, watch = conv_task(), Blocks()
    ctx = Context(task, device=CPU, stopwatch=watch)
    model, _ = run_step(step("prune.structured", of="latency", keep=0.6, multiple=4), task.fresh(), ctx)
    before, after = watch([task.original, model])
    assert after / before <= 0.62
    assert forward_macs(model, task.example) < forward_macs(task.original, task.example)
    assert watch.asked < 40


def test_time_that_falls_in_steps_is_met_by_measuring_anew():
    """Channels pay where eight of them leave together; a table of few widths misses that, and says so."""
    task, found = conv_task(), {}
    for rounds in (1, 2):
        ctx = Context(task, device=CPU, stopwatch=Blocks())
        settings = {"of": "latency", "keep": 0.5, "multiple": 1, "rounds": rounds}
        model, record = run_step(step("prune.structured", **settings), task.fresh(), ctx)
        before, after = Blocks()([task.original, model])
        found[rounds] = (after / before, record.warnings)
    assert found[1][0] > 0.55 and "more rounds measure anew" in found[1][1][0]
    assert found[2][0] <= 0.5


def test_noise_of_the_stopwatch_is_no_change():
    """Each round measures anew; where nothing goes, nothing is healed either, however the times differ."""
    task = conv_task()

    class Noisy(Blocks):
        def __call__(self, models: Sequence[nn.Module]) -> list[float]:
            return [time * (1 + 0.01 * (self.asked + place)) for place, time in enumerate(super().__call__(models))]

    ctx = Context(task, device=CPU, stopwatch=Noisy())
    with pytest.raises(NoEffect, match=r"prune\.structured changed nothing"):
        run_step(step("prune.structured", of="latency", keep=0.6, rounds=2, only="none"), task.fresh(), ctx)
