"""CIFAR-10 with the residual networks of He et al. (arXiv:1512.03385, section 4.2), whose shortcuts pad channels with zeros."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.data import Arrays
from ..core.task import Task, ready_made
from .source import Source
from .splits import balanced_order, shifted

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VERSION = 1


@ready_made("cifar10-resnet20")
def resnet20() -> Task:
    """ResNet-20 tuned on the JPEG copy of CIFAR-10: 269,722 parameters, 10,000 test images, 87.82% right."""
    test, train = "cifar10/cifar10_jpeg_test.npz", "cifar10/cifar10_jpeg_train25k.npz"
    weights = "cifar10/resnet20_jpeg_finetuned.safetensors"
    source = Source("cifar10-resnet20", test, train, weights, "nets.py", "load.py")
    return Task(
        name="cifar10-resnet20",
        model=lambda: source.weights(source.module("nets").CifarResNet(3), weights),
        **splits(jpeg_images(source, train), jpeg_images(source, test), validate=5000),
        batch_size=128,
        fingerprint=source.fingerprint(VERSION),
        notes="Of the 25,000 training images 20,000 train (the first 512 calibrate) and 5,000 validate, stratified and seeded. "
        "The original network was tuned on all of them, so it does better on the validation split (not on the test split) than on new images.",
    )


@ready_made("cifar10-resnet56")
def resnet56() -> Task:
    """ResNet-56 on the original pixels of CIFAR-10: 853,018 parameters, 1,017 test images, 92.72% right."""
    images, weights = "cifar10/cifar10_lossless.npz.xz", "cifar10/resnet56.safetensors"
    source = Source("cifar10-resnet56", images, weights, "nets.py", "load.py")
    found = source.cached(images, VERSION, lambda: lossless_images(source, images))
    return Task(
        name="cifar10-resnet56",
        model=lambda: source.weights(source.module("nets").CifarResNet(9), weights),
        **splits((found["train_x"], found["train_y"]), (found["test_x"], found["test_y"]), validate=1568),
        batch_size=128,
        fingerprint=source.fingerprint(VERSION),
        notes="Of the 8,068 training images 6,500 train (the first 512 calibrate) and 1,568 validate, stratified and seeded. The original network "
        "was trained on all of them, so it does better on the validation split (not on the test split) than on new images.",
    )


def splits(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], validate: int) -> dict[str, Arrays]:
    """Train, validate and test from (images, labels), N x 3 x H x W bytes; `validate` of the training images are set aside."""
    order = balanced_order(train[1])
    kept, aside = order[:-validate], order[-validate:]
    convert = normalizer(MEAN, DEVIATION)
    return {
        "train": Arrays(train[0][kept], train[1][kept], augment=shifted(4, flip=True), convert=convert),
        "validate": Arrays(train[0][aside], train[1][aside], convert=convert),
        "test": Arrays(*test, convert=convert),
    }


def normalizer(mean: tuple[float, ...], deviation: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """Bytes (N x C x H x W) to floats of about zero mean and unit variance per channel."""
    centre, spread = (torch.tensor(value).view(1, -1, 1, 1) for value in (mean, deviation))
    return lambda images: (images.float() / 255 - centre) / spread


def jpeg_images(source: Source, file: str) -> tuple[Tensor, Tensor]:
    """All images of a packed set of JPEG files, N x 3 x H x W bytes, and their labels."""
    found = source.cached(file, VERSION, lambda: decoded(*source.module("load").jpegs(source.path(file))))
    return found["x"], found["y"]


def decoded(images: object, labels: object) -> dict[str, Tensor]:
    """Images N x H x W x 3 and labels, as arrays, in the layout that networks take."""
    return {"x": torch.as_tensor(images).permute(0, 3, 1, 2), "y": torch.as_tensor(labels).long()}


def lossless_images(source: Source, file: str) -> dict[str, Tensor]:
    """The original pixels: `train_x`, `train_y`, `test_x`, `test_y`."""
    found = source.module("load").npz_xz(source.path(file))
    parts = {part: decoded(found[f"{part}_x"], found[f"{part}_y"]) for part in ("train", "test")}
    return {f"{part}_{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
