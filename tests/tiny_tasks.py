"""Tasks that take milliseconds: one that works, and one for each thing that can be wrong with a task."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import featherweight as fw

CLASSES, WIDTH = 4, 16


class Net(nn.Module):
    """Two convolutions and a linear layer: N x 1 x 8 x 8 to N x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.classify = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.classify(x.amax((2, 3)))


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with a bar in one of four directions: images and the direction."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    pixels = torch.randn(count, 1, 8, 8, generator=generator) * 0.2
    line = torch.arange(8)
    for image, label in zip(pixels[:, 0], labels.tolist()):
        bars = ((3, line), (line, 3), (line, line), (line, 7 - line))
        image[bars[label]] += 1.5
    return pixels, labels


def trained() -> nn.Module:
    torch.manual_seed(0)
    net, (pixels, labels) = Net(), images(256, 1)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(pixels), labels).backward()
        optimizer.step()
    return net.eval()


def bars() -> fw.Task:
    """Four directions of a bar."""
    return fw.Task(
        name="bars",
        model=trained,
        train=fw.Arrays(*images(256, 1)),
        validate=fw.Arrays(*images(200, 2)),
        test=fw.Arrays(*images(200, 3)),
    )


def noisy() -> fw.Task:
    """A task that writes to standard output, as libraries do: from Python, to the descriptor, and through C."""
    import ctypes
    import os

    print("printed")
    os.write(1, b"written\n")
    ctypes.CDLL(None).printf(b"formatted\n")
    return bars()


def raises() -> fw.Task:
    raise ValueError("the labels are on the other disk")


def gives_a_number() -> Any:
    return 3


def model_raises() -> fw.Task:
    def model() -> nn.Module:
        raise FileNotFoundError("weights.pt")

    return replace(bars(), model=model)


def wrong_shape() -> fw.Task:
    pixels, labels = images(200, 3)
    return replace(bars(), test=fw.Arrays(pixels.reshape(-1, 64), labels))


def no_validation() -> fw.Task:
    return replace(bars(), validate=None)


def nan_weight() -> fw.Task:
    net = trained()
    with torch.no_grad():
        net.second.weight[0, 0, 0, 0] = float("nan")
    return replace(bars(), model=net)


def nan_data() -> fw.Task:
    pixels, labels = images(200, 2)
    pixels[117, 0, 3, 3] = float("nan")
    return replace(bars(), validate=fw.Arrays(pixels, labels))
