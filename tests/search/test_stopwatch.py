"""The stopwatch that steps get: models timed on the target, and what of that decides which prefix is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_tasks import one_thread  # noqa: F401
from torch import nn

from featherweight.core.context import Context
from featherweight.core.data import Arrays
from featherweight.core.errors import TaskError
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.search.stopwatch import Stopwatch
from featherweight.search.store import prefix_key


def net(width: int, depth: int = 1) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(16, width), *layers, nn.Linear(width, 3)).eval()


def task() -> Task:
    x, y = torch.randn(64, 16), torch.randint(0, 3, (64,))
    return Task(name="points", model=net(8), train=Arrays(x, y), test=Arrays(x, y))


def test_larger_models_take_longer_and_the_order_is_kept():
    watch = Stopwatch(target("onnxruntime"), task())
    large, small, middle = watch([net(512, 6), net(16), net(512, 2)])
    assert 0 < small < middle < large


def test_steps_that_measure_are_known_by_the_target_and_others_are_not():
    job = task()
    plain, ort, torch_target = (
        Context(job, stopwatch=None if name is None else Stopwatch(target(name), job))
        for name in (None, "onnxruntime", "torch")
    )
    counted, timed = (step("prune.structured", of=of) for of in ("macs", "latency"))
    assert len({prefix_key((counted,), ctx) for ctx in (plain, ort, torch_target)}) == 1
    assert len({prefix_key((timed,), ctx) for ctx in (plain, ort, torch_target)}) == 3


def test_without_a_target_there_is_one_clear_error():
    with pytest.raises(TaskError, match="give one, or use of=macs"):
        Context(replace(task())).seconds([net(8)])
