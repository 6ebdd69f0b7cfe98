"""Denoising: DnCNN (Zhang et al., arXiv:1608.03981) for Gaussian noise of standard deviation 25 (of 255)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.outputs import first
from ..core.task import Task, labels, ready_made
from .metrics import denoising_psnr
from .source import DATA, Source

VERSION = 1
WEIGHTS, PICTURES = "dncnn/dncnn_S-25.safetensors", "bsds500/bsds500_train.zip"
SET12 = tuple(f"dncnn/Set12/{number:02}.png" for number in range(1, 13))
NOISE = 25 / 255
PATCH, PATCHES, VALIDATE, CROP = 64, 8, 40, 128


class Noisy:
    """A map-style data set of grey images (N x 1 x H x W bytes) with noise: fresh with a generator, else fixed."""

    def __init__(self, clean: Tensor, seed: int = 0):
        self.clean, self.seed = clean, seed

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch(torch.tensor([index]))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        clean = self.clean[index].float() / 255
        own = [generator or torch.Generator().manual_seed(self.seed + place) for place in index.tolist()]
        return with_noise(clean, torch.stack([torch.randn(clean.shape[1:], generator=item) for item in own]))


def with_noise(clean: Tensor, noise: Tensor) -> dict[str, Tensor]:
    """A batch: `x` is what the network gets, `labels` the image without noise."""
    return {"x": clean + noise * NOISE, "labels": clean}


def noise_loss(output: Any, batch: Any) -> Tensor:
    """Mean squared difference between the estimated and the real noise."""
    return nn.functional.mse_loss(first(output), batch["x"] - labels(batch))


@ready_made("denoise-dncnn", variables=(DATA,), packages=("PIL",))
def denoise_dncnn() -> Task:
    """Noise taken off grey pictures by DnCNN-S: 556,032 parameters, the 12 pictures of Set12, 30.40 dB."""
    source = Source("denoise-dncnn", WEIGHTS, PICTURES, *SET12, "nets.py", "load.py")
    found = source.cached(PICTURES, VERSION, lambda: read(source))
    return Task(
        name="denoise-dncnn",
        model=lambda: source.weights(source.module("nets").DnCNN(17), WEIGHTS),
        train=Noisy(found["train"]),
        validate=Noisy(found["validate"]),
        test=test_batches(source),
        loss=noise_loss,
        metric=denoising_psnr(),
        dynamic={"x": {0: "batch", 2: "height", 3: "width"}},
        batch_size=16,
        calibration_limit=64,
        fingerprint=source.fingerprint(VERSION),
        notes="Patches of 64 x 64 from 160 BSDS500 training pictures train (the first 64 calibrate), the middle of 40 "
        "others validates (the original network was trained on these pictures). Set12 tests, each picture a batch of "
        "its own with noise of a fixed seed.",
    )


def test_batches(source: Source) -> list[dict[str, Tensor]]:
    """The 12 pictures of Set12 with their noise, in order of their names."""
    generator, batches = torch.Generator().manual_seed(0), []
    for file in SET12:
        clean = grey(source.path(file)).float()[None, None] / 255
        batches.append(with_noise(clean, torch.randn(clean.shape, generator=generator)))
    return batches


def grey(picture: Any) -> Tensor:
    """A picture (a path, or an H x W x 3 array of bytes) as H x W bytes."""
    from PIL import Image

    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else Image.open(picture)
    return torch.from_numpy(np.array(image.convert("L")))


def read(source: Source) -> dict[str, Tensor]:
    """`train`: random patches of the first pictures; `validate`: the middle of the others; N x 1 x H x W bytes."""
    pictures = [grey(array) for _, array in source.module("load").zip_images(source.path(PICTURES))]
    generator = torch.Generator().manual_seed(0)
    patches = [patch(picture, generator) for picture in pictures[:-VALIDATE] for _ in range(PATCHES)]
    return {
        "train": torch.stack(patches)[:, None],
        "validate": torch.stack([middle(item) for item in pictures[-VALIDATE:]])[:, None],
    }


def patch(picture: Tensor, generator: torch.Generator) -> Tensor:
    """A random PATCH x PATCH part of an H x W picture."""
    top, left = (int(torch.randint(0, size - PATCH + 1, (1,), generator=generator)) for size in picture.shape)
    return picture[top : top + PATCH, left : left + PATCH]


def middle(picture: Tensor) -> Tensor:
    """The CROP x CROP part in the middle of an H x W picture."""
    top, left = ((size - CROP) // 2 for size in picture.shape)
    return picture[top : top + CROP, left : left + CROP]
