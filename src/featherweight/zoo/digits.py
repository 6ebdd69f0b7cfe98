"""The embedded task: scikit-learn's handwritten digits and a small residual network, trained on the spot."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.data import Arrays
from ..core.files import tensor_digest
from ..core.fit import Training
from ..core.task import Task, ready_made
from .splits import balanced_order, shifted
from .trained import trained

TRAIN, VALIDATE = 897, 300  # of 1,797; the rest is the test split
TRAINING = Training(epochs=18, lr=4e-3, weight_decay=5e-2, batch_size=64)


class ConvNorm(nn.Sequential):
    """A 3 x 3 convolution and batch norm; `stride` 2 halves height and width."""

    def __init__(self, before: int, after: int, stride: int = 1):
        super().__init__(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after))


class Residual(nn.Module):
    """Two convolutions beside a shortcut (He et al., arXiv:1512.03385)."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = ConvNorm(width, width), ConvNorm(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.second(torch.relu(self.first(x))))


class DigitsNet(nn.Module):
    """Four 3 x 3 convolutions (two beside a shortcut) and a linear layer: N x 1 x 8 x 8 in 0..1 to 10 logits."""

    def __init__(self, widths: tuple[int, int] = (64, 128)):
        super().__init__()
        self.stem = ConvNorm(1, widths[0])
        self.down = ConvNorm(widths[0], widths[1], stride=2)
        self.block = Residual(widths[1])
        self.classify = nn.Linear(widths[1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.down(torch.relu(self.stem(x))))
        return self.classify(self.block(x).mean((2, 3)))


@ready_made("digits")
def digits() -> Task:
    """Handwritten digits of 8 x 8 pixels (scikit-learn, 1,797 real images), a residual network; needs no file."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target).long()
    train, validate, test = balanced_order(labels).split([TRAIN, VALIDATE, len(labels) - TRAIN - VALIDATE])
    task = Task(
        name="digits",
        model=DigitsNet,
        train=Arrays(images[train], labels[train], augment=shifted(1)),
        validate=Arrays(images[validate], labels[validate]),
        test=Arrays(images[test], labels[test]),
        fingerprint=tensor_digest({"images": images, "labels": labels, "order": torch.cat([train, validate, test])}),
        notes="897 images train (the first 512 calibrate), 300 validate, 600 test; stratified, seeded and disjoint.",
    )
    return replace(task, model=trained(task, DigitsNet, TRAINING))
