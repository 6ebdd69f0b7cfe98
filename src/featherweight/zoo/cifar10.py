"""CIFAR-10 with the residual networks of He et al. (arXiv:1512.03385, 4.2), whose shortcuts pad channels with zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.data import Arrays
from ..core.task import Task, ready_made
from .source import DATA, Source
from .splits import balanced_order, shifted

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VERSION = 1


@ready_made("cifar10-resnet20", variables=(DATA,), packages=("PIL",))
def resnet20() -> Task:
    """ResNet-20 tuned on the JPEG copy of CIFAR-10 (269,722 parameters), 10,000 test images, 87.82% right."""
    train, test = "cifar10/cifar10_jpeg_train25k.npz", "cifar10/cifar10_jpeg_test.npz"
    weights = "cifar10/resnet20_jpeg_finetuned.safetensors"
    source = Source("cifar10-resnet20", train, test, weights, "nets.py", "load.py")
    images, labels = jpeg_images(source, train)
    order = balanced_order(labels)
    kept, aside = order[:20000], order[20000:]
    return Task(
        name="cifar10-resnet20",
        model=lambda: source.weights(source.module("nets").CifarResNet(3), weights),
        train=Arrays(images[kept], labels[kept], augment=shifted(4, flip=True), convert=normalized),
        validate=Arrays(images[aside], labels[aside], convert=normalized),
        test=Arrays(*jpeg_images(source, test), convert=normalized),
        batch_size=128,
        fingerprint=source.fingerprint(VERSION),
        notes="Of the 25,000 training images 20,000 train (the first 512 calibrate) and 5,000 validate, stratified and "
        "seeded.",
    )


@ready_made("cifar10-resnet56", variables=(DATA,), packages=("PIL",))
def resnet56() -> Task:
    """ResNet-56 on the original pixels of CIFAR-10 (853,018 parameters), 1,017 test images, 92.72% right."""
    images, others = "cifar10/cifar10_lossless.npz.xz", "cifar10/cifar10_jpeg_test.npz"
    weights = "cifar10/resnet56.safetensors"
    source = Source("cifar10-resnet56", images, others, weights, "nets.py", "load.py")
    found = source.cached(images, VERSION, lambda: lossless_images(source, images))
    unseen, unseen_labels = jpeg_images(source, others)
    aside = unlike(found["test_x"], unseen)
    aside = aside[balanced_order(unseen_labels[aside])[:2000]]
    return Task(
        name="cifar10-resnet56",
        model=lambda: source.weights(source.module("nets").CifarResNet(9), weights),
        train=Arrays(found["train_x"], found["train_y"], augment=shifted(4, flip=True), convert=normalized),
        validate=Arrays(unseen[aside], unseen_labels[aside], convert=normalized),
        test=Arrays(found["test_x"], found["test_y"], convert=normalized),
        batch_size=128,
        fingerprint=source.fingerprint(VERSION),
        notes="8,068 training images train (the first 512 calibrate), the first 1,017 of the official test set test. "
        "The network knows all training images by heart (99.9% right), so others validate: 2,000 of the official test "
        "images that are not among the 1,017, stratified and seeded; of those there is but a JPEG copy (83% right).",
    )


def unlike(images: Tensor, others: Tensor) -> Tensor:
    """Indices of those of `others` that are no copy of one of `images` (both bytes, N x C x H x W).

    For each image the nearest of `others` is left out.
    """
    one, other = (part.flatten(1).float() for part in (images, others))
    distance = (other**2).sum(1) - 2 * one @ other.T
    kept = torch.ones(len(others), dtype=torch.bool)
    kept[distance.argmin(1)] = False
    return kept.nonzero()[:, 0]


def normalized(images: Tensor) -> Tensor:
    """Bytes (N x 3 x H x W) to floats of about zero mean and unit variance per channel."""
    mean, deviation = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, DEVIATION))
    return (images.float() / 255 - mean) / deviation


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
