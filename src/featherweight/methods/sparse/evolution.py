"""Masks that change while a network is trained: what is watched, when they change, what the optimizer forgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from featherweight.core.soft import Mask
from featherweight.model.masks import plain_weight

from .exchange import decayed, exchange


@dataclass
class Evolution:
    """The exchange of connections during one training; `during` and `after` go to `ctx.fit`.

    `layers` are by name, each with the mask on its weight. Every `interval` optimizer steps a share of each layer's
    connections, `fraction` at first and falling to nothing at `stop`, is exchanged: by the gradient of the dense weight
    over the batch of that step, or by chance if a `generator` is given. Grown weights begin at zero, and whatever the
    optimizer remembers of them too.
    """

    layers: dict[str, tuple[nn.Module, Mask]]
    fraction: float
    interval: int
    stop: float
    generator: torch.Generator | None = None
    exchanged: dict[str, int] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    due: bool = False

    def watch(self) -> list[RemovableHandle]:
        """Let the gradients of the dense weights be noted in steps that end with an exchange."""
        return [mask.register_forward_hook(self._note(name)) for name, (_, mask) in self.layers.items()]

    def during(self, _model: nn.Module, t: float) -> None:
        """Before a step: whether it ends with an exchange."""
        self.steps += t < 1  # the last call is behind the last step
        self.due = self.steps % self.interval == 0 and decayed(self.fraction, t, self.stop) > 0

    def after(self, optimizer: torch.optim.Optimizer, t: float) -> None:
        """After a step: exchange connections if it is due."""
        if not self.due:
            return
        share = decayed(self.fraction, t, self.stop)
        for name, (layer, mask) in self.layers.items():
            self._exchange(name, layer, mask, share, optimizer)
        self.gradients.clear()

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_mask: nn.Module, _given: tuple[Tensor, ...], weight: Tensor) -> None:
            if self.due and self.generator is None and weight.requires_grad:
                weight.register_hook(lambda gradient: self._add(name, gradient))

        return hook

    def _add(self, name: str, gradient: Tensor) -> None:
        # a layer that runs several times in a step has one gradient per run
        self.gradients[name] = self.gradients[name] + gradient if name in self.gradients else gradient

    @torch.no_grad()
    def _exchange(
        self, name: str, layer: nn.Module, mask: Mask, share: float, optimizer: torch.optim.Optimizer
    ) -> None:
        weight, before = plain_weight(layer), mask.keep.clone()
        if self.generator is not None:
            growth = torch.rand(before.shape, generator=self.generator).to(weight.device)
        elif name in self.gradients:
            growth = self.gradients[name].abs()
        else:
            return  # the layer did not run in this step
        after = exchange(before, weight, growth, int(share * int(before.sum())))
        both = before & after
        weight.mul_(both)
        for remembered in optimizer.state.get(weight, {}).values():
            if isinstance(remembered, Tensor) and remembered.shape == weight.shape:
                remembered.mul_(both)
        mask.keep.copy_(after)
        self.exchanged[name] = self.exchanged.get(name, 0) + int((after & ~before).sum())
