"""The time that a run may take, and what training costs of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch

from ..core.context import Context
from ..core.fit import Training, fit, steps_per_epoch
from ..core.step import Step
from ..core.task import Task

STEPS = 4  # training steps that are timed


@dataclass
class Clock:
    """Seconds since the start against a limit (None: no limit); `spent` counts what earlier parts of a resumed run
    used.
    """

    limit: float | None
    spent: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @property
    def used(self) -> float:
        return self.spent + time.perf_counter() - self.started

    @property
    def left(self) -> float:
        return math.inf if self.limit is None else self.limit - self.used


def seconds_per_epoch(task: Task, seed: int = 0) -> float:
    """What an epoch of training the original model with its own outputs as soft targets costs here: a few steps,
    timed, times their number.
    """
    ctx = Context(task, seed=seed)
    per_epoch = batches_per_epoch(task)
    model = ctx.task.fresh().to(ctx.device)
    first = _timed_steps(model, ctx, 1, per_epoch)
    step = first if first > 10 else _timed_steps(model, ctx, STEPS, per_epoch) / STEPS
    return (step + _forward_seconds(ctx)) * per_epoch


def batches_per_epoch(task: Task) -> int:
    """Training steps in an epoch at the task's batch size."""
    return steps_per_epoch(Context(task), task.batch_size)


def _timed_steps(model: torch.nn.Module, ctx: Context, steps: int, per_epoch: int) -> float:
    start = time.perf_counter()
    fit(model, ctx, Training(epochs=steps / per_epoch, lr=1e-8), text="timing")
    return time.perf_counter() - start


@torch.no_grad()
def _forward_seconds(ctx: Context) -> float:
    batch = next(ctx.batches("train"))
    start = time.perf_counter()
    ctx.task.call(ctx.teacher, batch)
    return time.perf_counter() - start


def epochs_of(item: Step) -> float:
    """Epochs that a step trains in all, its retraining in rounds included."""
    own = float(getattr(item, "epochs", 0.0)) if item.trains else 0.0
    retrain = getattr(item, "retrain", None)
    return own + (retrain.epochs * int(getattr(item, "rounds", 1)) if retrain is not None else 0.0)
