"""The Hessian of the squared output error of layers, from calibration data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import NotFinite, TaskError
from ...model.moments import observe

OBSERVED = (nn.Linear, nn.Conv1d, nn.Conv2d)


def hessians(model: nn.Module, names: list[str], ctx: Context) -> dict[str, Tensor]:
    """`X^T X / n` over the calibration split for each named layer: float32, [groups, inputs, inputs] on its device.

    `X` holds the n rows that the layer multiplies with its weight: the vectors into a linear layer (one group), the
    patches under the kernel of a convolution, apart for each of its groups; padding of sequences does not count.
    `inputs` is the size of one row of the weight. One pass for all names; only one matrix per layer and group is kept,
    whatever the data: call it with few names at a time where these are large. Raises `TaskError` if a layer is never
    called or there are no data, `NotFinite` if an input is.
    """
    found = {}
    for name, moments in observe(model.eval(), names, ctx).items():
        if moments.hessian is None:
            raise TaskError(f"the layer {name!r} met no calibration data; skip it, or give data that reach it")
        found[name] = moments.mean()
        if not torch.isfinite(found[name]).all():
            raise NotFinite(f"calibration: the inputs of the layer {name!r} hold NaN or infinite entries")
    return found
