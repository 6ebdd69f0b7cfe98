"""A task with two inputs, one of them integers, and outputs in a dict: what the axes are tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.data import Arrays
from featherweight.core.task import Task

CLASSES, WIDTH, KINDS = 5, 8, 3


class TwoInputs(nn.Module):
    """N x 8 floats and N kinds to a dict of logits (N x 5) and hidden (N x 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(KINDS, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, kind: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.first(x + self.embed(kind)))
        return {"logits": self.second(hidden), "hidden": hidden}


class Named(Arrays):
    """A data set that gives mappings, as Hugging Face's do."""

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Any:
        x, kind, labels = super().batch(index, generator)
        return {"x": x, "kind": kind, "labels": labels}


def model() -> nn.Module:
    torch.manual_seed(0)
    return TwoInputs().eval()


def data(count: int, seed: int) -> Named:
    """Inputs whose label is the class that the model names for four in five of them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    kind = torch.randint(0, KINDS, (count,), generator=generator)
    with torch.no_grad():
        labels = model()(x, kind)["logits"].argmax(1)
    wrong = torch.arange(count) % 5 == 0
    return Named(x, kind, torch.where(wrong, (labels + 1) % CLASSES, labels))


def two_inputs(**changes: Any) -> Task:
    """The task; its accuracy is 80% by construction."""
    settings: dict[str, Any] = {
        "calibrate": data(20, 1),
        "test": data(150, 2),
        "validate": data(50, 3),
        "batch_size": 32,
    }
    return Task(name="two inputs", model=model, **settings | changes)
