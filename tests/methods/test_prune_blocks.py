"""Pruning of depth: what is taken away, what stays, what is said."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_tasks import blocks_task, one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context, count_parameters, run_step
from featherweight.core.errors import NoEffect, TaskError
from featherweight.core.fit import task_loss
from featherweight.core.task import Task
from featherweight.methods.prune.blocks import BlockPrune, losses_without, savings
from featherweight.methods.prune.depth import give_back, rank
from featherweight.model.blocks import find_blocks, without
from featherweight.model.cost import forward_macs
from featherweight.model.skeleton import load, save

CPU = torch.device("cpu")


def pruned(task: Task, **settings: Any) -> tuple[Any, Context]:
    ctx = Context(task, device=CPU)
    model, _ = run_step(BlockPrune(**settings), task.fresh(), ctx)
    return model, ctx


def test_what_is_missed_least_goes_and_the_rest_saves_and_loads(tmp_path: Path):
    task = blocks_task()
    model, ctx = pruned(task, keep=0.85, rounds=1, recalibrate=False)
    losses = losses_without(
        task.fresh(), Context(task, device=CPU), ["rows.0", "rows.1", "rows.2", "rows.3"], task_loss
    )
    least = min((name for name in losses if name), key=losses.__getitem__)
    assert list(ctx.record.changed) == [least, f"{least}.a", f"{least}.b"]
    assert forward_macs(model, task.example) / forward_macs(task.original, task.example) < 0.85
    assert count_parameters(model) < count_parameters(task.original)
    save(model, tmp_path / "model")
    assert torch.equal(load(tmp_path / "model", like=task.original)(**task.example), model(**task.example))


def test_losses_are_those_of_the_network_without_the_block():
    task = blocks_task()
    ctx, model = Context(task, device=CPU), task.fresh()
    names = ["rows.0", "rows.1", "rows.2", "rows.3"]
    found = losses_without(model, ctx, names, task_loss)
    for name in ["", *names]:
        smaller = without(model, [name] if name else [])
        batches = list(task.batches("calibrate"))
        sizes = [task.count(batch) for batch in batches]
        with torch.no_grad():
            losses = [float(task.loss(task.call(smaller, batch), batch)) for batch in batches]
        want = sum(size * loss for size, loss in zip(sizes, losses)) / sum(sizes)
        assert found[name] == pytest.approx(want, rel=1e-5)


def test_every_block_is_reported_once_with_a_reason():
    _, ctx = pruned(blocks_task(), keep=0.6, skip=("rows.1",))
    left = {item.layer: item.reason for item in ctx.record.left}
    assert left["rows.1"] == "excluded by skip='rows.1'"
    assert left["turned.0"].startswith("it turns")
    assert left["head"] == "it is in no block that could be taken away"
    assert not set(left) & set(ctx.record.changed)
    assert all(how.startswith("taken away") for how in ctx.record.changed.values())


def test_at_least_as_many_blocks_stay_as_were_asked_for_and_it_says_so():
    model, ctx = pruned(blocks_task(), keep=0.2, min_blocks=2)
    assert len(model.rows) == 2
    assert any("not 20.0%" in text for text in ctx.record.warnings)


def test_latency_needs_a_target_and_is_measured_where_there_is_one():
    with pytest.raises(TaskError, match="give one, or use of=macs"):
        pruned(blocks_task(), of="latency")
    task, asked = blocks_task(), []

    class Fixed:
        name = "a millisecond for each block"

        def __call__(self, models: Any) -> list[float]:
            asked.append(len(models))
            return [1e-3 + 1e-3 * len(model.rows) for model in models]

    ctx = Context(task, device=CPU, stopwatch=Fixed())
    model, _ = run_step(BlockPrune(keep=0.65, of="latency", rounds=1), task.fresh(), ctx)
    assert len(model.rows) == 2
    assert asked == [3, 2]  # beside the whole network; the four blocks look alike: one of them is measured


class Plus(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def test_blocks_that_look_alike_save_what_they_compute_where_they_stand():
    """The same two blocks before and behind a pooling: a quarter of the places, a quarter of the work."""
    halves = [nn.Sequential(Plus(4), Plus(4)) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(1, 4, 1), halves[0], nn.MaxPool2d(2), halves[1]).eval()
    example = {"input": torch.randn(2, 1, 8, 8)}

    def costs(models: Any) -> list[float]:
        return [forward_macs(each, example) for each in models]

    _, saved = savings(model, costs, ["1.0", "1.1", "3.0", "3.1"], example)
    assert saved == {"1.0": 2 * 64 * 144, "1.1": 2 * 64 * 144, "3.0": 2 * 16 * 144, "3.1": 2 * 16 * 144}


def test_the_layers_of_torchs_own_transformer_cost_what_they_compute():
    """One fused operator computes a whole layer where nothing is trained; it must not count as nothing."""
    torch.manual_seed(0)
    rows = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 3, enable_nested_tensor=False)
    linear, attention = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32), 2 * 2 * 5 * 5 * 16
    assert forward_macs(rows.eval(), {"src": torch.randn(2, 5, 16)}) == 3 * (linear + attention)
    x = torch.randn(32, 5, 16)
    task = Task(name="encoder", model=rows, calibrate=[(x, x)], test=[(x, x)])
    smaller, ctx = pruned(task, keep=0.67, score="outputs")
    assert len(smaller.layers) == 2 and not ctx.record.warnings


class Stage(nn.Module):
    """Blocks behind a layer that changes the width: N x inner to N x out."""

    def __init__(self, inner: int, out: int):
        super().__init__()
        self.turn, self.blocks = nn.Linear(inner, out), nn.Sequential(*(Plain(out) for _ in range(3)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.turn(x))


class Plain(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def test_the_blocks_of_stages_that_cannot_go_themselves_are_found():
    """As in ConvNeXt, Swin and RegNet: a row of stages that change the width, each with a row of blocks."""
    torch.manual_seed(0)
    model = nn.Sequential(Stage(6, 8), Stage(8, 10), nn.Linear(10, 3)).eval()
    found = find_blocks(model, {"input": torch.randn(2, 6)})
    assert found.blocks == [f"{stage}.blocks.{place}" for stage in (0, 1) for place in range(3)]
    assert found.left == {"0": "it turns (6,) into (8,)", "1": "it turns (8,) into (10,)"}


def test_outputs_need_no_labels_and_loss_says_that_it_does():
    task = blocks_task(labels=False)
    model, _ = pruned(task, score="outputs")
    assert len(model.rows) < 4
    with pytest.raises(TaskError, match="score=outputs"):
        pruned(task)


def test_a_network_without_rows_is_refused():
    with pytest.raises(NoEffect, match="finds no block to take away"):
        pruned(blocks_task(), only="turned.*")


COSTS = st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 9), min_size=1)


@given(COSTS, st.integers(0, 30))
def test_what_is_given_back_was_not_needed(saved: dict[str, int], wanted: int):
    chosen = give_back(list(saved), saved, wanted)
    total = sum(saved[name] for name in chosen)
    if sum(saved.values()) < wanted:
        assert chosen == list(saved)
    else:
        assert total >= wanted
        assert all(total - saved[name] < wanted for name in chosen)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(0, 3)), min_size=1, max_size=6))
def test_the_order_is_that_of_loss_per_cost(pairs: list[tuple[float, float]]):
    losses = {str(place): loss for place, (loss, _) in enumerate(pairs)}
    saved = {str(place): gain for place, (_, gain) in enumerate(pairs)}
    order = rank(losses, saved)
    assert set(order) == {name for name, gain in saved.items() if gain > 0}
    for one, other in itertools.pairwise(order):
        if losses[one] > 0:
            assert losses[other] > 0
            assert losses[one] / saved[one] <= losses[other] / saved[other]
