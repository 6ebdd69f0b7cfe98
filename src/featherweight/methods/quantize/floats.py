"""The floats that stay beside quantized weights: rounded to few binary digits, so that an entropy coder takes less."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.core.context import Context
from featherweight.model.select import Kinds, LayerStep, excluded

from .ratedistortion import on_grid, to_digits


def leave_floats(step: LayerStep, model: nn.Module, types: Kinds, ctx: Context) -> None:
    """Report every module with parameters of its own that is of none of `types`: its floats are at most rounded."""
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if own and not isinstance(module, types) and ".parametrizations." not in f".{name}.":
            reason = (
                excluded(name, step.only, step.skip) or "is no layer that is quantized; its floats are only rounded"
            )
            ctx.leave(name or type(module).__name__, reason)


@torch.no_grad()
def round_floats(step: LayerStep, model: nn.Module, digits: int) -> None:
    """Round the plain parameters and the statistics of batch norms, in place, to about `digits` binary digits.

    Modules that `only` and `skip` leave out stay as they are. Means are rounded in parts of their deviation.
    """
    for name, parameter in model.named_parameters():
        plain = "parametrizations" not in name.split(".")
        if plain and excluded(name.rpartition(".")[0], step.only, step.skip) is None:
            parameter.copy_(on_grid(parameter, digits))
    for name, norm in model.named_modules():
        if not isinstance(norm, _BatchNorm) or excluded(name, step.only, step.skip) is not None:
            continue
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_var.copy_(to_digits(norm.running_var, norm.running_var, digits))
            norm.running_mean.copy_(to_digits(norm.running_mean, (norm.running_var + norm.eps).sqrt(), digits))
