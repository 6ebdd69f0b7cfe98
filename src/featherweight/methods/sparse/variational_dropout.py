"""sparse.variational_dropout: every weight learns how much noise it stands; those that stand any are zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from featherweight.core.context import Context
from featherweight.core.fit import Term, Training, training_inputs
from featherweight.core.step import Between, Trait
from featherweight.model.masks import mask_on, maskable, put_mask, zeros
from featherweight.model.select import LayerStep

from .noise import divergence, log_alpha

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PARAMETER = "log_variance"  # of the noise on each weight, while it is trained


class VariationalDropout(LayerStep, Training, kind="sparse.variational_dropout"):
    """Train with Gaussian noise of learned variance on every weight; those that are mostly noise become zero.

    Noise is added to the outputs of a layer, with the variance that the noise on its weights has there (local
    reparametrization, arXiv:1506.02557). The loss grows by `weight` times the divergence from the log-uniform prior
    over the number of training inputs, from nothing up during the first share `ramp` of the training. Variances start
    at exp(`start`) and have a learning rate of their own. Afterwards weights whose variance is more than
    exp(`threshold`) times their square are zero and held there. Layers that are not called as modules are left alone.
    Raises `TaskError` without training data, `NotFinite` if the loss leaves the finite numbers.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.TRAINABLE
    takes: ClassVar[Trait] = Trait.RESHAPABLE
    trains: ClassVar[bool] = True
    paper: ClassVar[str] = "arXiv:1701.05369"

    weight: Annotated[float, Field(gt=0), Between(0.03, 3, log=True)] = 1.0
    ramp: Annotated[float, Field(ge=0, le=1)] = 0.3
    threshold: float = 3.0
    start: float = -10.0
    variance_lr: Annotated[float, Field(gt=0)] = 0.05

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        chosen = self._chosen(model, ctx)
        if not chosen:
            return model
        scale = self.weight / training_inputs(ctx)
        progress = 0.0

        def during(_model: nn.Module, t: float) -> None:
            nonlocal progress
            progress = min(1.0, t / self.ramp) if self.ramp else 1.0

        own: Term = Training.term(self)

        def term(model: nn.Module, batch: Any, output: Any, ctx: Context) -> Tensor:
            penalty = torch.stack([divergence(ratios(layer)) for layer in chosen.values()]).sum()
            return own(model, batch, output, ctx) + progress * scale * penalty

        with noisy(chosen, self.start):
            groups = [{"params": [_log_variance(layer) for layer in chosen.values()], "lr": self.variance_lr}]
            groups[0] |= {"weight_decay": 0.0}
            loss = ctx.fit(model, self, term=term, during=during, text=self.kind, groups=groups)
            keep = {name: kept(layer, self.threshold) for name, layer in chosen.items()}
        for name, layer in chosen.items():
            put_mask(layer, keep[name])
            if mask_on(layer) is None:
                ctx.leave(name, f"trained, but none of its weights has a log alpha above {self.threshold:g}")
            else:
                ctx.change(name, zeros(layer))
        ctx.change("*", f"trained for {self.epochs:g} epochs, last loss {loss:.4g}")
        return model

    def _chosen(self, model: nn.Module, ctx: Context) -> dict[str, nn.Module]:
        """The layers that get noise."""
        found = maskable(self, model, ctx)
        called: set[str] = set()
        ctx.observe(model, {name: _add(called, name) for name in found})
        for name in list(found):
            if not isinstance(found[name], (nn.Linear, *CONVOLUTIONS)):
                ctx.leave(name, f"noise on the outputs of {type(found[name]).__name__} is not worked out")
            elif name not in called:
                ctx.leave(name, "calibration does not call it as a module, so nothing can be added to its outputs")
            else:
                continue
            del found[name]
        return found


def _add(called: set[str], name: str) -> Callable[[tuple[Any, ...], Any], None]:
    return lambda _given, _output: called.add(name)


def _log_variance(layer: nn.Module) -> nn.Parameter:
    return layer.get_parameter(PARAMETER)


def ratios(layer: nn.Module) -> Tensor:
    """log alpha of the weights that are not held at zero already, in one row."""
    ratio = log_alpha(layer.weight, _log_variance(layer))  # type: ignore[arg-type]
    mask = mask_on(layer)
    return ratio.flatten() if mask is None else ratio[mask.keep]


@torch.no_grad()
def kept(layer: nn.Module, threshold: float) -> Tensor:
    """Which weights are more than noise: a boolean mask of the weight's shape."""
    return log_alpha(layer.weight, _log_variance(layer)) <= threshold  # type: ignore[arg-type]


@contextmanager
def noisy(layers: Mapping[str, nn.Module], start: float) -> Iterator[None]:
    """Within this block the layers learn a variance for each weight, and in training their outputs are noisy."""
    handles = []
    for layer in layers.values():
        weight: Tensor = layer.weight  # type: ignore[assignment]
        layer.register_parameter(PARAMETER, nn.Parameter(torch.full_like(weight.detach(), start)))
        handles.append(layer.register_forward_hook(with_noise, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            delattr(layer, PARAMETER)


def with_noise(layer: nn.Module, given: tuple[Tensor, ...], named: Mapping[str, Tensor], output: Tensor) -> Tensor:
    """The output of a layer with the noise that independent Gaussian noise on its weights makes there."""
    if not layer.training:
        return output
    variance, mask = _log_variance(layer).exp(), mask_on(layer)
    if mask is not None:
        variance = variance * mask.keep
    squared = (given[0] if given else named["input"]).square()
    if isinstance(layer, CONVOLUTIONS):
        spread = layer._conv_forward(squared, variance, None)
    else:
        spread = functional.linear(squared, variance)
    return output + torch.sqrt(spread + 1e-8) * torch.randn_like(output)
