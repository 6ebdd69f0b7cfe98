"""One pass over a split: a torch model or an artifact gives outputs, the task's metric makes records of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .data import to_device
from .errors import NotFinite, TaskError
from .metric import Records
from .outputs import as_arrays
from .progress import Progress
from .task import Split, Task

if TYPE_CHECKING:
    from .context import Context

Run = Callable[[Any], Any]  # a batch -> its outputs, as arrays in the torch model's layout


def records(task: Task, run: Run, split: Split = "test", progress: Progress | None = None) -> Records:
    """The metric's records of every input of `split`, in order; `task.metric.reduce` gives the figure.

    Raises `TaskError` if the split is missing or empty, `NotFinite` if a record is NaN or infinite.
    """
    parts = []
    for batch in (progress or Progress()).track(task.batches(split), f"evaluating {split}"):
        part = np.asarray(task.metric.record(run(batch), batch))
        if not np.isfinite(part).all():
            raise NotFinite(f"task {task.name}, split {split!r}: the metric {task.metric.name} became NaN or infinite")
        parts.append(part)
    if not parts:
        raise TaskError(f"task {task.name}: the split {split!r} is empty")
    return np.concatenate(parts)


def torch_run(task: Task, model: nn.Module, device: torch.device | str = "cpu") -> Run:
    """How `model` runs on a batch of `task`: in evaluation mode, without gradients, on `device`."""
    model = model.to(device).eval()

    @torch.no_grad()
    def run(batch: Any) -> Any:
        return as_arrays(task.call(model, to_device(batch, device)))

    return run


def torch_figure(task: Task, model: nn.Module | None = None, split: Split = "test") -> float:
    """The metric of `model` (by default the task's own) over `split`, in the metric's unit."""
    return task.metric.reduce(records(task, torch_run(task, task.original if model is None else model), split))


@torch.no_grad()
def calibration_loss(model: nn.Module, ctx: Context) -> float:
    """The mean of the task's loss over the inputs of the calibration data."""
    total, seen = 0.0, 0
    model.to(ctx.device).eval()
    for batch in ctx.batches("calibrate"):
        count = ctx.task.count(batch)
        total += count * float(ctx.task.loss(ctx.task.call(model, batch), batch))
        seen += count
    if not torch.isfinite(torch.tensor(total)):
        raise NotFinite("the loss over the calibration data is NaN or infinite, so layers cannot be compared by it")
    return total / max(1, seen)
