"""Training for as long as a budget lasts: how many epochs that are is measured, on a copy, before it starts."""

from __future__ import annotations

import copy
import os
import time
from itertools import pairwise
from statistics import median

import torch
from torch import nn

from featherweight.core.context import Context
from featherweight.core.fit import Training, steps_per_epoch

STEPS = 12  # of the training that is timed; the first two pay for what is made once


def busy_seconds() -> float:
    """Seconds of the processor per thread of torch, those of peers that ran beside it included: what this would have
    taken on a machine that does nothing else.
    """
    peers = os.times()
    return (time.process_time() + peers.children_user + peers.children_system) / torch.get_num_threads()


def step_seconds(model: nn.Module, ctx: Context, training: Training) -> float:
    """Median seconds of one step of `training`, from a few steps on a copy."""
    ticks: list[float] = []
    each = STEPS / steps_per_epoch(ctx, training.batch_size or ctx.task.batch_size)
    ctx.fit(
        copy.deepcopy(model),
        training.model_copy(update={"epochs": each}),
        during=lambda _model, _t: ticks.append(busy_seconds()),
        text="timing of training",
    )
    return median(later - earlier for earlier, later in pairwise(ticks[2:]))


def train_for(seconds: float, model: nn.Module, ctx: Context, training: Training) -> float:
    """Train `model` in place for about so many seconds of the processor per thread; return the epochs that fit in."""
    start = busy_seconds()
    each = step_seconds(model, ctx, training)
    left = seconds - (busy_seconds() - start)
    steps = max(1, int(left / each))
    epochs = steps / steps_per_epoch(ctx, training.batch_size or ctx.task.batch_size)
    ctx.fit(model, training.model_copy(update={"epochs": epochs}), text=f"training for {epochs:.1f} epochs")
    return epochs
