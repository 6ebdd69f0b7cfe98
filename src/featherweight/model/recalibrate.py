"""Statistics of batch norms, taken anew after a network changed."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.context import Context


@torch.no_grad()
def recalibrate(model: nn.Module, ctx: Context) -> None:
    """Take the running statistics of every batch norm anew, as means over the calibration batches (of two inputs or
    more).
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    before = [(norm.momentum, copy.deepcopy(dict(norm.named_buffers()))) for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    seen = 0
    for batch in ctx.progress.track(ctx.batches("calibrate"), "recalibrating batch norms"):
        if ctx.task.count(batch) > 1:
            ctx.task.call(model, batch)
            seen += 1
    for norm, (momentum, buffers) in zip(norms, before):
        norm.momentum = momentum
        norm.eval()
        if not seen:
            norm.load_state_dict(buffers, strict=False)
    if not seen:
        ctx.warn("batch norms were not recalibrated: the calibration batches hold one input each")
