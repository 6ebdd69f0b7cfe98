"""Small models for the tests of targets, and a link that stores a weight as a test asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from featherweight.core.encoding import Affine, spread
from featherweight.core.soft import Link
from featherweight.model.port import DynamicPort, Port


class Kept(Link):
    """Stand for exactly these integers."""

    def __init__(self, values: Tensor, scale: Tensor, zero: Tensor, axis: int | None, bits: int = 8):
        super().__init__()
        self.axis, self.bits = axis, bits
        for name, tensor in (("values", values), ("scale", scale), ("zero", zero)):
            self.register_buffer(name, tensor)

    def forward(self, weight: Tensor) -> Tensor:
        return self.encode(weight).decode()

    def encode(self, weight: Tensor) -> Affine:
        return Affine(self.values, self.scale, self.zero, self.axis, self.bits)


def keep_as(module: nn.Module, attribute: str, form: str = "int8", axis: int | None = 0, bits: int = 8) -> Kept:
    """Store `module.attribute` as integers: int8 around zero, or uint8 with a zero point."""
    weight = getattr(module, attribute).detach()
    low, high = weight.amin(), weight.amax()
    if axis is not None:
        others = [place for place in range(weight.dim()) if place != axis]
        low, high = weight.amin(others), weight.amax(others)
    if form == "int8":
        scale = torch.maximum(-low, high) / 127
        zero = torch.zeros_like(scale, dtype=torch.int8)
        limits = (-127, 127)
    else:
        scale = (high.clamp(min=0) - low.clamp(max=0)) / 255
        zero = torch.round(-low.clamp(max=0) / scale).to(torch.uint8)
        limits = (0, 255)
    integers = torch.round(weight / spread(scale, weight, axis)) + spread(zero.float(), weight, axis)
    link = Kept(integers.clamp(*limits).to(zero.dtype), scale, zero, axis, bits)
    parametrize.register_parametrization(module, attribute, link)
    return link


class Convolutions(nn.Module):
    """Batch norm, a strided and a depthwise convolution, a padded shortcut, a pooled head; one tensor in, one out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.depthwise(self.stem(x)))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(self.down(x) + short).mean((2, 3)))


class Recurrent(nn.Module):
    """Characters through an embedding, a two-way LSTM and a GRU; a tuple of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(10, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        first, _ = self.lstm(self.embedding(tokens))
        second, last = self.gru(first)
        return self.head(second[:, -1]), last[0]


class Attention(nn.Module):
    """A transformer block over tokens with a mask and an argument that it never reads; a dict, one entry None."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(13, 16), nn.Parameter(torch.randn(1, 12, 16) * 0.1)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Any]:
        x = self.embed(input_ids) + self.place[:, : input_ids.shape[1]]
        heads = [layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=attention_mask[:, None, None, :].bool())
        x = self.norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return {"hidden": x + self.down(F.gelu(self.up(x))), "extra": None, "pooled": x.mean(1)}


@dataclass(frozen=True)
class Case:
    """A model, inputs for a batch of any size, and which dimensions are free."""

    model: nn.Module
    inputs: Any
    free: dict[str, dict[int, str]]


def convolutions() -> Case:
    model = Convolutions()
    with torch.no_grad():
        model.stem[1].running_mean.normal_()
        model.stem[1].running_var.uniform_(0.5, 2)
    return Case(model.eval(), lambda n: {"x": torch.randn(n, 3, 12, 12)}, {"x": {0: "batch"}})


def recurrent() -> Case:
    return Case(Recurrent().eval(), lambda n: {"tokens": torch.randint(0, 11, (n, 7))}, {"tokens": {0: "batch"}})


def attention(length: int = 6) -> Case:
    def inputs(n: int, length: int = length) -> dict[str, Tensor]:
        mask = torch.ones(n, length, dtype=torch.int64)
        mask[0, length // 2 :] = 0
        ids = torch.randint(0, 13, (n, length))
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}

    free = {name: {0: "batch", 1: "length"} for name in ("input_ids", "attention_mask", "token_type_ids")}
    return Case(Attention().eval(), inputs, free)


CASES = {"convolutions": convolutions, "recurrent": recurrent, "attention": attention}


# -- models with ports ------------------------------------------------------------------------------------------------
class Ported(nn.Module):
    """A residual network as static quantization leaves it: ports around everything that can run on integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.second, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Linear(32, 5)
        self.ports = nn.ModuleList([Port(0.03, 128), *(Port(0.02, 0) for _ in range(2)), Port(0.02, 120)])
        self.join, self.pooled = Port(0.03, 0), Port(0.01, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ports[1](F.relu(self.stem(self.ports[0](x))))
        y = self.ports[3](self.second(self.ports[2](F.relu(self.first(x)))))
        short = self.ports[1](F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8)))
        return self.head(self.pooled(self.join(F.relu(y + short)).mean((2, 3))))


def ported(form: str = "int8") -> Ported:
    """`Ported` with its weights stored."""
    model = Ported().eval()
    for layer in (model.stem, model.first, model.second, model.head):
        keep_as(layer, "weight", form)
    return model


class Dynamic(nn.Module):
    """Three linear layers that read one dynamically quantized value, and one that reads their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.port, self.last = DynamicPort(), DynamicPort()
        self.q, self.k, self.v = nn.Linear(16, 8), nn.Linear(16, 8, bias=False), nn.Linear(16, 8)
        self.out = nn.Linear(8, 4)
        for layer in (self.q, self.k, self.v, self.out):
            keep_as(layer, "weight")

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q(self.port(x)) * self.k(self.port(x)) + self.v(self.port(x))
        return self.out(self.last(mixed.mean(1)))
