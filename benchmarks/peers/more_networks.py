"""More networks built in code: recurrent ones, mixers, autoencoders, attention written out, experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from networks import conv, ids, image, network, rows
from torch import Tensor, nn


class Recurrent(nn.Module):
    """An embedding, a recurrent layer, a linear layer on its last output."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1):
        super().__init__()
        self.embed, self.project = nn.Embedding(40, 24), nn.Linear(24, 20)
        self.recurrent = kind(20, 24, layers, batch_first=True)
        self.hidden, self.head = nn.Linear(24, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.recurrent(self.project(self.embed(x)))[0][:, -1]
        return self.head(torch.relu(self.hidden(y)))


@network("LSTM", ids())
def lstm() -> nn.Module:
    return Recurrent(nn.LSTM)


@network("GRU, two layers", ids())
def gru() -> nn.Module:
    return Recurrent(nn.GRU, 2)


class Tied(nn.Module):
    """A language model whose last layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(40, 24), nn.Linear(24, 48), nn.Linear(48, 24)
        self.head = nn.Linear(24, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        return self.head(y + self.down(torch.relu(self.up(y))))


@network("tied embeddings", ids())
def tied() -> nn.Module:
    return Tied()


class MixerBlock(nn.Module):
    """Linear layers over positions, then over channels (arXiv:2105.01601)."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(length, 2 * length), nn.GELU(), nn.Linear(2 * length, length))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.one(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.two(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 10)
        self.blocks = nn.Sequential(MixerBlock(16, 24), MixerBlock(16, 24))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


@network("MLP-Mixer", image(16))
def mixer() -> nn.Module:
    return Mixer()


class Experts(nn.Module):
    """Every expert computes, gates weigh (a dense mixture of experts), with a residual connection."""

    def __init__(self, width: int = 12, count: int = 4):
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width)) for _ in range(count)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], -1)
        return self.head(x + (outputs * gates[:, :, None]).sum(-1))


@network("mixture of experts, dense", rows())
def experts() -> nn.Module:
    return Experts()


class Stacked(nn.Module):
    """Experts in two stacked weights, each token sent to its two best by a product with all (as einsum)."""

    def __init__(self, width: int = 12, inner: int = 32, count: int = 4):
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.up = nn.Parameter(torch.randn(count, width, inner) / 4)
        self.down = nn.Parameter(torch.randn(count, inner, width) / 4)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        best = gates.topk(2, -1).values[..., -1:]
        gates = gates * (gates >= best)
        y = torch.einsum("btd,edh->bteh", x, self.up)
        y = torch.einsum("bteh,ehd->bted", F.gelu(y), self.down)
        return self.head(x + torch.einsum("bted,bte->btd", y, gates))


@network("mixture of experts, stacked", rows())
def stacked() -> nn.Module:
    return Stacked()


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(conv(3, 16, 3, 2), conv(16, 24, 3, 2), nn.Flatten(), nn.Linear(24 * 16, 16))
        self.widen = nn.Linear(16, 24 * 16)
        self.decode = nn.Sequential(
            nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.widen(self.encode(x)))
        return self.decode(y.view(-1, 24, 4, 4))


@network("convolutional autoencoder", image(16))
def autoencoder() -> nn.Module:
    return AutoEncoder()


class Temporal(nn.Module):
    """Dilated one-dimensional convolutions with gated units (as WaveNet, arXiv:1609.03499)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(12, 16, 1)
        self.gates = nn.ModuleList(nn.Conv1d(16, 32, 3, padding=2**place, dilation=2**place) for place in range(3))
        self.back = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))
        self.head = nn.Conv1d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x.transpose(1, 2))
        for gate, back in zip(self.gates, self.back):
            one, other = gate(y).chunk(2, 1)
            y = y + back(torch.tanh(one) * torch.sigmoid(other))
        return self.head(F.relu(y))


@network("WaveNet", rows(12, 12))
def wavenet() -> nn.Module:
    return Temporal()


@network("torch's own transformer encoder", rows(6, 24))
def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
    return Named(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


class Named(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


class SuperResolution(nn.Module):
    """Residual blocks without norms, then pixels out of channels (as EDSR, arXiv:1707.02921)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, 1, 1), nn.Conv2d(16, 3, 3, 1, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1)) for _ in range(2)
        )
        self.up = nn.Sequential(nn.Conv2d(16, 64, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for block in self.blocks:
            y = y + 0.1 * block(y)
        return self.last(self.up(y))


@network("EDSR, pixel shuffle", image(12))
def edsr() -> nn.Module:
    return SuperResolution()
