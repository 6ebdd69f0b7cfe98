"""Small networks, one for each way in which dimensions come to belong together, and how their coupling is checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.core.context import count_parameters
from featherweight.model.cost import parameters
from featherweight.model.cut import disagreement, remove
from featherweight.model.groups import Coupling, Cut, couple


class Net(nn.Module):
    """Layers and values by name, and a function of (self, x) that uses them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def lively(model: nn.Module) -> nn.Module:
    """Random weights, scales and statistics everywhere, so that a mistake shows in the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                scale = 1 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 0.5
                tensor.copy_(noise.abs() + 0.5 if "var" in name else noise * scale)
    return model.eval()


def widths(coupling: Coupling) -> dict[str, int]:
    """For every weight that a group cuts along its first dimension, the number of units of its groups together."""
    found: dict[str, int] = {}
    for place in coupling.free():
        for name, dim in coupling.groups[place].places:
            if dim == 0 and name.endswith("weight"):
                found[name] = found.get(name, 0) + len(coupling.groups[place])
    return found


def every_other(coupling: Coupling) -> Cut:
    """Half of the units of every group."""
    return {place: np.arange(0, len(coupling.groups[place]) - 1, 2) for place in coupling.free()}


def check(model: nn.Module, example: dict[str, Tensor]) -> Coupling:
    """The coupling of `model`, after half of everything was removed and gave what silencing gives, and what the cost
    said.
    """
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coupling = couple(model, example)
    cut = every_other(coupling)
    assert disagreement(model, coupling, cut, example) == ""
    smaller = remove(copy.deepcopy(model), coupling, cut)
    kept = [len(group) - len(cut.get(place, ())) for place, group in enumerate(coupling.groups)]
    assert parameters(coupling)(kept) == count_parameters(smaller)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), (
        "the model was changed"
    )
    return coupling


def linear(*sizes: int) -> list[nn.Linear]:
    return [nn.Linear(one, other) for one, other in pairwise(sizes)]


def attention(self: Any, x: Tensor) -> Tensor:
    """Heads by a number that the module holds; scaled by a number, or by the size of a head."""
    q, k, v = (
        layer(x).view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v)
    )
    y = (q @ k.transpose(-1, -2) * (self.scale or q.shape[-1] ** -0.5)).softmax(-1) @ v
    return self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


def fused(self: Any, x: Tensor) -> Tensor:
    """Query, key and value from one layer, cut as 3 x heads x size."""
    qkv = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], scale=0.5)
    return self.o(y.transpose(1, 2).flatten(2))


def einsum(self: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).unflatten(-1, (-1, self.size)) for layer in (self.q, self.k, self.v))
    y = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
    return self.o(torch.einsum("bhnm,bmhd->bnhd", y, v).flatten(2))


def grouped_queries(self: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).view(*x.shape[:2], -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.3)
    return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))


def squeeze_excite(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3))))))
    return self.b(y * gate[:, :, None, None]).mean((2, 3))


def shuffled(self: Any, x: Tensor) -> Tensor:
    """ShuffleNet v1: grouped convolutions with channels woven between."""
    y = F.relu(self.a(x))
    y = y.view(y.shape[0], self.groups, -1, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
    return self.c(F.relu(self.b(y))).mean((2, 3))


def halves(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.a(x))
    half = y.shape[-1] // 2
    return self.b(y[:, :half]) + self.c(y[:, half:])


def mlp(middle: Callable[[Any, Tensor], Tensor], width: int = 8, inner: int | None = None, **parts: Any) -> Net:
    """Linear, something, linear."""
    return Net(
        lambda self, x: self.b(middle(self, self.a(x))), a=nn.Linear(6, width), b=nn.Linear(inner or width, 3), **parts
    )


def conv(middle: Callable[[Any, Tensor], Tensor], width: int = 8, inner: int | None = None, **parts: Any) -> Net:
    """Convolution, something, convolution."""
    layers = {"a": nn.Conv2d(3, width, 3), "b": nn.Conv2d(inner or width, 4, 1)}
    return Net(lambda self, x: self.b(middle(self, self.a(x))).mean((2, 3)), **layers, **parts)


def attend(run: Callable[[Any, Tensor], Tensor], keys: int, **parts: Any) -> Net:
    """Attention with 12 outputs of the queries and `keys` of the keys and values."""
    layers = {"q": nn.Linear(8, 12), "k": nn.Linear(8, keys), "v": nn.Linear(8, keys), "o": nn.Linear(12, 8)}
    return Net(run, **layers, **parts)


def detached(y: Tensor) -> Tensor:
    with torch.no_grad():
        return y * 2


def tied() -> nn.Module:
    """Two layers that share one weight, with a width between each."""
    net = Net(
        lambda s, x: s.b(s.a(x)) + s.d(s.c(x)),
        a=nn.Linear(6, 8),
        b=nn.Linear(8, 3),
        c=nn.Linear(6, 8),
        d=nn.Linear(8, 3),
    )
    net.c.weight = net.a.weight
    return net


def coupling_name(model: nn.Module, weight: str) -> str:
    """The first name of a tied tensor, which is the one that groups use."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return next(name for name, tensor in tensors.items() if tensor is tensors[weight])
