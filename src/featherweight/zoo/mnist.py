"""MNIST with the two networks that the literature on pruning started from, trained on the spot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.data import Arrays
from ..core.fit import Training
from ..core.task import Task, ready_made
from .source import DATA, Source
from .splits import balanced_order, shifted, unit_range
from .trained import trained

FILE = "mnist/mnist.npz.xz"
VERSION = 1
VALIDATE = 5000


def lenet5() -> nn.Module:
    """LeNet-5 as Caffe has it (LeCun et al. 1998): N x 1 x 28 x 28 to 10 logits, 431,080 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def lenet300() -> nn.Module:
    """LeNet-300-100 (LeCun et al. 1998): N x 1 x 28 x 28 to 10 logits, 266,610 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )


@ready_made("mnist-lenet5", variables=(DATA,))
def mnist_lenet5() -> Task:
    """LeNet-5 on MNIST: 431,080 parameters, 10,000 test images; trained on the spot (about two minutes, once)."""
    return task("mnist-lenet5", lenet5, Training(epochs=6, lr=2e-3, weight_decay=1e-2, batch_size=128), reach=2)


@ready_made("mnist-lenet300", variables=(DATA,))
def mnist_lenet300() -> Task:
    """LeNet-300-100 on MNIST: 266,610 parameters, 10,000 test images; trained on the spot (about a minute, once)."""
    return task("mnist-lenet300", lenet300, Training(epochs=15, lr=2e-3, weight_decay=1e-2, batch_size=128), reach=1)


def task(name: str, make: Callable[[], nn.Module], training: Training, reach: int, seed: int = 0) -> Task:
    """MNIST for the network that `make` gives, trained from scratch with `seed`; training images are shifted by up to
    `reach` pixels.
    """
    source = Source(name, FILE, "load.py")
    images = source.cached(FILE, VERSION, lambda: read(source))
    order = balanced_order(images["train_y"])
    kept, aside = order[:-VALIDATE], order[-VALIDATE:]

    def part(index: Tensor, **rest: Callable) -> Arrays:
        return Arrays(images["train_x"][index], images["train_y"][index], convert=unit_range, **rest)

    made = Task(
        name=name,
        model=make,
        train=part(kept, augment=shifted(reach)),
        validate=part(aside),
        test=Arrays(images["test_x"], images["test_y"], convert=unit_range),
        batch_size=128,
        fingerprint=source.fingerprint(VERSION),
        notes="Of the 60,000 training images 55,000 train (the first 512 calibrate) and 5,000 validate, stratified and "
        "seeded; 10,000 test.",
    )
    return replace(made, model=trained(made, make, training, seed))


def read(source: Source) -> dict[str, Tensor]:
    """`train_x`, `train_y`, `test_x`, `test_y`: images N x 1 x 28 x 28 bytes."""
    found = source.module("load").npz_xz(source.path(FILE))
    images = {f"{part}_x": torch.from_numpy(found[f"{part}_x"])[:, None] for part in ("train", "test")}
    return images | {f"{part}_y": torch.from_numpy(found[f"{part}_y"]).long() for part in ("train", "test")}
