"""How much each input of a layer matters to the loss: second moments weighted by gradients, from calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import NotFinite, TaskError
from ...model.moments import Moments, rows_of


def loss_hessians(model: nn.Module, names: list[str], ctx: Context) -> dict[str, tuple[Tensor, Tensor]]:
    """`sum w x x^T` [groups, inputs, inputs] over the calibration split for each named layer, and `sum w` per output.

    `x` is what the layer multiplies with its weight (see `hessians`), `w` the squared gradient of the task's loss in
    what it gives there, summed over the outputs of the group: up to a factor the Gauss-Newton Hessian of the loss, with
    the rows of the weight taken alike and apart (GuidedQuant, arXiv:2505.07004). What the loss does not look at, such
    as padding, has no weight. The sums of one batch of the data are divided by the number of batches. One forward and
    one backward pass; one matrix per layer and group is kept. Raises `TaskError` if a layer is never called or the
    loss does not depend on it, `NotFinite` if a gradient is not finite.
    """
    modules = dict(model.named_modules())
    moments = {name: Moments() for name in names}
    outputs: dict[str, Tensor] = {}
    with _trainable([modules[name] for name in names]), torch.enable_grad():
        for batch in ctx.progress.track(ctx.batches("calibrate"), "observing gradients"):
            for name, rows, weight in _weighted_rows(modules, names, model.eval(), batch, ctx):
                moments[name].add([rows * weight.sum(1).sqrt()[..., None]])
                outputs[name] = outputs.get(name, 0) + weight.sum(2).flatten()
    for name, moment in moments.items():
        if name not in outputs or not outputs[name].any():
            raise TaskError(f"the loss does not depend on the layer {name!r} over the calibration data; skip it")
        assert moment.hessian is not None
        if not torch.isfinite(moment.hessian).all():
            raise NotFinite(f"calibration: inputs or gradients of the layer {name!r} are NaN or infinite")
    return {name: (moment.hessian, outputs[name]) for name, moment in moments.items() if moment.hessian is not None}


def _weighted_rows(
    modules: dict[str, nn.Module], names: list[str], model: nn.Module, batch: Any, ctx: Context
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For each call of a layer: its rows [groups, n, inputs] and their weights [groups, outputs, n], in pieces."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    handles = [modules[name].register_forward_hook(_kept(name, calls)) for name in names]
    try:
        loss = ctx.task.loss(ctx.task.call(model, batch), batch)
    finally:
        for handle in handles:
            handle.remove()
    if not calls:
        return
    gradients = torch.autograd.grad(loss, [output for _, _, output in calls], allow_unused=True)
    for (name, given, _), gradient in zip(calls, gradients):
        if gradient is None:
            continue
        done, weights = 0, _row_weights(modules[name], gradient.float())
        for rows in rows_of(modules[name], given.float()):
            yield name, rows, weights[..., done : done + rows.shape[1]]
            done += rows.shape[1]


def _kept(name: str, calls: list[tuple[str, Tensor, Tensor]]) -> Callable[..., Tensor]:
    """A hook that notes the input and the output of a layer, and passes a copy on: activations may work in place."""

    def hook(_module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
        if not given:
            raise TaskError(f"the layer {name!r} is given its input by keyword, which cannot be observed; skip it")
        calls.append((name, given[0].detach(), output))
        return output.clone()

    return hook


def _row_weights(layer: nn.Module, gradient: Tensor) -> Tensor:
    """The squared gradient in each output at each row, in the order of `rows_of`: [groups, outputs, rows]."""
    squares = gradient.square()
    if isinstance(layer, nn.Linear):
        return squares.reshape(1, -1, squares.shape[-1]).mT
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    squares = squares if squares.dim() == layer.weight.dim() else squares[None]
    return squares.transpose(0, 1).flatten(1).unflatten(0, (layer.groups, -1))


@contextmanager
def _trainable(layers: list[nn.Module]) -> Iterator[None]:
    """Let gradients reach what these layers give, also where their parameters are frozen."""
    frozen = [parameter for layer in layers for parameter in layer.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
