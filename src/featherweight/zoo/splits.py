"""Splits and changes of training data: pure functions on tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def balanced_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A random order of N items, each prefix of which holds the classes in the shares that all N do (within one item each).

    `labels`: N integers. Within its class each item gets a random rank; items are ordered by rank over class size.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        place[members] = (torch.randperm(len(members), generator=generator) + 0.5).double() / len(members)
    return place.argsort(stable=True)


def random_order(count: int, seed: int = 0) -> Tensor:
    """A random order of `count` items."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def shifted(reach: int, flip: bool = False) -> Callable[[Tensor, torch.Generator], Tensor]:
    """An augmentation of N x C x H x W images: a random shift by up to `reach` pixels (zeros come in), half of them mirrored if `flip`.

    The same as padding by `reach` and cropping at random (He et al., arXiv:1512.03385, section 4.2).
    """

    def augment(images: Tensor, generator: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        padded = torch.nn.functional.pad(images, (reach,) * 4)
        down, right = torch.randint(0, 2 * reach + 1, (2, count, 1), generator=generator)
        columns = torch.arange(width).repeat(count, 1)
        if flip:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, width - 1 - columns, columns)
        rows, columns, item = down + torch.arange(height), right + columns, torch.arange(count)[:, None, None]
        return padded[item, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

    return augment
