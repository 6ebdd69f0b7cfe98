"""Real tasks that take milliseconds: scikit-learn's digits for a small convolutional net and a small transformer."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from featherweight.core.context import Context
from featherweight.core.data import Arrays
from featherweight.core.fit import Training
from featherweight.core.task import Task


class ConvNet(nn.Module):
    """Convolutions with batch norm, a shortcut, a depthwise one, and two linear layers: N x 1 x 8 x 8 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv, self.conv_norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.hidden, self.drop, self.head = nn.Linear(64, 32), nn.Dropout(0.1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = nn.functional.max_pool2d(torch.relu(x + self.conv_norm(self.conv(x))), 2)
        x = nn.functional.avg_pool2d(torch.relu(self.depth(x)), 2).flatten(1)
        return self.head(self.drop(torch.relu(self.hidden(x))))


class PooledNet(ConvNet):
    """The same with a mean over all positions before its linear layers, which takes images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = nn.functional.max_pool2d(torch.relu(x + self.conv_norm(self.conv(x))), 2)
        return self.head(self.drop(torch.relu(self.hidden(torch.relu(self.depth(x)).mean((2, 3))))))


class Attention(nn.Module):
    """Self-attention with four linear layers: N x T x width to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        query, key, value = (
            layer(x).view(size, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(size, length, width))


class Transformer(nn.Module):
    """One block over the eight rows of a picture: N x 8 x 8 to N x 10."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.zeros(1, 8, width))
        self.attend, self.norm = Attention(width, 4), nn.LayerNorm(width)
        self.wide, self.narrow, self.last = nn.Linear(width, 48), nn.Linear(48, width), nn.LayerNorm(width)
        self.act = nn.GELU()
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        x = self.norm(x + self.attend(x))
        x = self.last(x + self.narrow(self.act(self.wide(x))))
        return self.head(x.mean(1))


class Chooser(nn.Module):
    """A router as transformers has it: N x width to logits, and weights and indices of two experts."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = 2, experts
        self.weight = nn.Parameter(torch.randn(experts, width) * 0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(x, self.weight)
        values, indices = logits.softmax(-1).topk(self.top_k)
        return logits, values / values.sum(-1, keepdim=True), indices


class Stack(nn.Module):
    """Gated feed-forwards in stacks of weights, each computed for every token: N x width to the same."""

    def __init__(self, width: int, neurons: int, experts: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * neurons, width) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, width, neurons) * 0.2)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("ehd,nd->enh", self.gate_up, x).chunk(2, -1)
        made = torch.einsum("edh,enh->end", self.down, self.act_fn(gate) * up)
        share = (indices[..., None] == torch.arange(len(made))).float() * weights[..., None]
        return torch.einsum("ne,end->nd", share.sum(1), made)


class Mixture(nn.Module):
    """A router and its experts, laid out as in Mixtral: N x T x width to the same."""

    def __init__(self, width: int, neurons: int, experts: int) -> None:
        super().__init__()
        self.gate, self.experts = Chooser(width, experts), Stack(width, neurons, experts)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        _, weights, indices = self.gate(tokens)
        return self.experts(tokens, indices, weights).reshape(x.shape)


class Mixed(nn.Module):
    """A dense feed-forward and a mixture of eight experts over the eight rows of a picture: N x 8 x 8 to N x 10."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.zeros(1, 8, width))
        self.attend, self.norm = Attention(width, 4), nn.LayerNorm(width)
        self.wide, self.act, self.narrow = nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)
        self.between, self.mixture, self.last = nn.LayerNorm(width), Mixture(width, 16, 8), nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        x = self.norm(x + self.attend(x))
        x = self.between(x + self.narrow(self.act(self.wide(x))))
        return self.head(self.last(x + self.mixture(x)).mean(1))


class Residual(nn.Module):
    """Two convolutions with batch norm, added to what goes in where the widths agree."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.b = nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.norm(self.a(x))))
        return x + y if x.shape == y.shape else y


class Deep(nn.Module):
    """A row of four residual blocks, and one whose block changes the width: N x 1 x 8 x 8 to N x 10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rows = nn.Conv2d(1, 8, 3, padding=1), nn.Sequential(*(Residual(8, 8) for _ in range(4)))
        self.turned, self.head = nn.ModuleList([Residual(8, 12), nn.ReLU()]), nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rows(torch.relu(self.stem(x)))
        for layer in self.turned:
            x = layer(x)
        return self.head(x.mean(3).flatten(1))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """For the modules that import it: more threads only make networks as small as these slower."""
    torch.set_num_threads(1)


@functools.cache
def digits(rows: bool = False) -> dict[str, Arrays]:
    """320 training, 64 calibration, 64 validation and 256 test images; as pictures or as rows."""
    found = load_digits()
    images = torch.from_numpy(found.images).float() / 16
    images = images if rows else images[:, None]
    labels = torch.from_numpy(found.target).long()
    parts = {"train": (0, 320), "calibrate": (320, 384), "validate": (384, 448), "test": (448, 704)}
    return {name: Arrays(images[start:end], labels[start:end]) for name, (start, end) in parts.items()}


@functools.cache
def trained(kind: Callable[[], nn.Module]) -> Task:
    """The task with a model of this kind, trained for some seconds at most."""
    torch.manual_seed(0)
    splits = digits(rows=kind in (Transformer, Mixed))
    model = kind()
    start = Task(name=kind.__name__.lower(), model=model, batch_size=64, **splits)
    Context(start, device=torch.device("cpu")).fit(model, Training(epochs=16, lr=1e-2))
    return Task(name=start.name, model=model.eval(), batch_size=64, **splits)


def conv_task() -> Task:
    return trained(ConvNet)


def pooled_task() -> Task:
    return trained(PooledNet)


def transformer_task() -> Task:
    return trained(Transformer)


def experts_task() -> Task:
    return trained(Mixed)


def blocks_task(labels: bool = True) -> Task:
    """A network with rows of blocks; without `labels` there are none in the calibration split."""
    task = trained(Deep)
    return task if labels else replace(task, calibrate=[task.calibrate.tensors[0]])


class TokenNet(nn.Module):
    """One block over token ids, whose positions may be more than the task's 16: N x T to N x 10."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(17, width), nn.Embedding(32, width)
        self.attend, self.norm = Attention(width, 4), nn.LayerNorm(width)
        self.wide, self.narrow, self.last = nn.Linear(width, 48), nn.Linear(48, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.table(x) + self.place(torch.arange(x.shape[1], device=x.device))
        y = self.norm(y + self.attend(y))
        y = self.last(y + self.narrow(nn.functional.gelu(self.wide(y))))
        return self.head(y.mean(1))


@functools.cache
def tokens_task() -> Task:
    """Digits as 16 tokens: the mean of each 2 x 2 pixels, from 0 to 16."""
    torch.manual_seed(0)
    splits = {}
    for name, part in digits().items():
        images, labels = part.tensors
        ids = nn.functional.avg_pool2d(16 * images, 2).round().long().flatten(1)
        splits[name] = Arrays(ids, labels)
    model = TokenNet()
    start = Task(name="tokennet", model=model, batch_size=64, **splits)
    Context(start, device=torch.device("cpu")).fit(model, Training(epochs=8, lr=1e-2))
    longer = {"x": {0: "batch", 1: "sequence"}}
    return Task(name="tokennet", model=model.eval(), batch_size=64, dynamic=longer, **splits)


@functools.cache
def student() -> nn.Module:
    """Another network with rows of blocks, trained for a moment."""
    torch.manual_seed(7)
    model = Deep()
    Context(Task(name="student", model=model, batch_size=64, **digits()), device=torch.device("cpu")).fit(
        model, Training(epochs=4, lr=1e-2)
    )
    return model.eval()


def accuracy(task: Task, model: nn.Module) -> float:
    """Share of test images that are named rightly."""
    images, labels = task.test.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(-1) == labels).float().mean())
