"""Splits and changes of training data: pure functions on tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


def balanced_order(labels: Tensor, seed: int = 0) -> Tensor:
    """A random order of N items of which each prefix holds the classes in their shares of all N, within one item each.

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


def apart(items: Sequence[Hashable], *others: Sequence[Hashable]) -> list[int]:
    """Indices of the items that are in none of `others`."""
    taken = set().union(*others)
    return [place for place, item in enumerate(items) if item not in taken]


def shifted(reach: int, flip: bool = False) -> Callable[[Tensor, torch.Generator], Tensor]:
    """An augmentation of N x C x H x W images: shifts by up to `reach` pixels, zeros coming in; `flip` mirrors half.

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


def unit_range(images: Tensor) -> Tensor:
    """Bytes to floats in 0..1."""
    return images.float() / 255
