"""Training inputs by number: which of them are in the batch at hand, and whether they are the same each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...core.data import batches, content_digest, is_map_style, tensors_in
from ...core.task import Task

LOOKED_AT = 64  # inputs that are asked for twice: chance does not draw as many of them alike


class NumberedItems:
    """A map-style data set that remembers, in `index`, which items the last batch held."""

    def __init__(self, data: Any):
        self.data, self.index, self.count = data, torch.empty(0, dtype=torch.long), len(data)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Any:
        return self.data[place]

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Any:
        self.index = index
        if hasattr(self.data, "batch"):
            return self.data.batch(index, generator)
        return torch.utils.data.default_collate([self.data[int(item)] for item in index])


class NumberedBatches:
    """A list of ready batches, whose inputs are numbered in its order; `index` says which the last batch held."""

    def __init__(self, data: Any, task: Task):
        self.data, self.index = data, torch.empty(0, dtype=torch.long)
        self.sizes = [task.count(batch) for batch in data]
        self.count = sum(self.sizes)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Any]:
        start = 0
        for batch, size in zip(self.data, self.sizes):
            self.index = torch.arange(start, start + size)
            start += size
            yield batch


Numbered = NumberedItems | NumberedBatches


def numbered(task: Task) -> tuple[Numbered | None, str]:
    """The training data of `task` by number, and an empty text; or None and why that is not possible."""
    if isinstance(task.train, list | tuple):
        return NumberedBatches(task.train, task), ""
    if not is_map_style(task.train):
        return None, "the training data give batches whose inputs have no number"
    if differ(task.train):
        return None, "the training data are augmented, or differ each time for another reason"
    return NumberedItems(task.train), ""


def differ(data: Any) -> bool:
    """Whether a map-style data set gives other inputs when the same ones are asked for again, as training asks."""
    places = torch.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).long()
    part = torch.utils.data.Subset(data, places.tolist()) if not hasattr(data, "batch") else None
    found = set()
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            generator = torch.Generator().manual_seed(seed)
            if part is None:
                batch = data.batch(places, generator)
            else:
                batch = next(batches(part, len(part)))
            found.add(content_digest([tensor.detach().cpu() for tensor in tensors_in(batch)]))
    return len(found) > 1
