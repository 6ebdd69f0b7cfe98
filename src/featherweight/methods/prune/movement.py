"""A mask whose scores are learned while the network trains: what moves away from zero stays."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ...core.soft import Mask
from .connections import Connections
from .saliency import moved


class Moving(Mask):
    """A mask that gathers the score of movement pruning of every weight, as gradients pass; it is never saved."""

    def __init__(self, mask: Mask):
        super().__init__(mask.keep)
        self.pattern = mask.pattern
        self.score = torch.zeros_like(mask.keep, dtype=torch.float32)

    def forward(self, weight: Tensor) -> Tensor:
        effective = weight * self.keep
        if effective.requires_grad:
            value = weight.detach().clone()
            effective.register_hook(lambda gradient: self._gather(value, gradient))
        return effective

    @torch.no_grad()
    def _gather(self, weight: Tensor, gradient: Tensor) -> None:
        self.score = moved(self.score, weight, gradient)


def exchange(each: Connections, mask: Mask) -> Connections:
    """The same connections under another mask."""
    links = each.layer.parametrizations["weight"]  # type: ignore[index]
    assert isinstance(links, parametrize.ParametrizationList)
    links[[link is each.mask for link in links].index(True)] = mask
    return Connections(each.name, each.layer, mask, each.axis, each.order, each.before)
