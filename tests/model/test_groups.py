"""Coupled dimensions: every rule, on a small network; and always: silenced equals removed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from featherweight.core.context import count_parameters
from featherweight.core.errors import TaskError
from featherweight.model.cost import macs, parameters
from featherweight.model.cut import agreeing, disagreement, remove, silence
from featherweight.model.groups import Coupling, Cut, couple
from featherweight.model.rules.labels import Labels, free
from featherweight.model.rules.reshape import runs


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
    """The coupling of `model`, after half of everything was removed and gave what silencing gives, and what the cost said."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coupling = couple(model, example)
    cut = every_other(coupling)
    assert disagreement(model, coupling, cut, example) == ""
    smaller = remove(copy.deepcopy(model), coupling, cut)
    kept = [len(group) - len(cut.get(place, ())) for place, group in enumerate(coupling.groups)]
    assert parameters(coupling)(kept) == count_parameters(smaller)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "the model was changed"
    return coupling


def linear(*sizes: int) -> list[nn.Linear]:
    return [nn.Linear(one, other) for one, other in zip(sizes, sizes[1:])]


def attention(self: Any, x: Tensor) -> Tensor:
    """Heads by a number that the module holds; scaled by a number, or by the size of a head."""
    q, k, v = (layer(x).view(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
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
    return Net(lambda self, x: self.b(middle(self, self.a(x))), a=nn.Linear(6, width), b=nn.Linear(inner or width, 3), **parts)


def conv(middle: Callable[[Any, Tensor], Tensor], width: int = 8, inner: int | None = None, **parts: Any) -> Net:
    """Convolution, something, convolution."""
    layers = {"a": nn.Conv2d(3, width, 3), "b": nn.Conv2d(inner or width, 4, 1)}
    return Net(lambda self, x: self.b(middle(self, self.a(x))).mean((2, 3)), **layers, **parts)


X, IMAGE, TOKENS = (2, 6), (2, 3, 8, 8), (2, 5, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "pointwise": (lambda: mlp(lambda s, y: F.gelu(y) * 2 + 1), X, {"a.weight": 8}),
    "sigmoid is not zero at zero": (lambda: mlp(lambda s, y: y.sigmoid()), X, {"a.weight": 8}),
    "dropout, clone, to": (lambda: mlp(lambda s, y: F.dropout(y, 0.5, s.training).clone().to(torch.float32)), X, {"a.weight": 8}),
    "scale of its own": (lambda: mlp(lambda s, y: y * s.g, g=nn.Parameter(torch.ones(8))), X, {"a.weight": 8}),
    "residual": (
        lambda: Net(lambda s, x: s.d((y := F.relu(s.a(x))) + s.c(F.relu(s.b(y)))), **dict(zip("abcd", linear(6, 8, 10, 8, 3)))),
        X,
        {"a.weight": 8, "b.weight": 10, "c.weight": 8},
    ),
    "in place": (lambda: mlp(lambda s, y: y.mul_(2).relu_()), X, {"a.weight": 8}),
    "cat": (
        lambda: Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=nn.Linear(6, 4), b=nn.Linear(6, 5), c=nn.Linear(9, 3)),
        X,
        {"a.weight": 4, "b.weight": 5},
    ),
    "cat with the input": (
        lambda: Net(lambda s, x: s.c(torch.cat([x, s.a(x)], -1)), a=nn.Linear(6, 4), c=nn.Linear(10, 3)),
        X,
        {"a.weight": 4},
    ),
    "stack": (
        lambda: Net(lambda s, x: s.c(torch.stack([s.a(x), s.b(x)]).amax(0)), a=nn.Linear(6, 4), b=nn.Linear(6, 4), c=nn.Linear(4, 3)),
        X,
        {"a.weight": 4, "b.weight": 4},
    ),
    "chunk": (lambda: mlp(lambda s, y: torch.mul(*y.chunk(2, -1)), 8, 4), X, {"a.weight": 4}),
    "glu": (lambda: mlp(lambda s, y: F.glu(y), 8, 4), X, {"a.weight": 4}),
    "split by a number held": (lambda: mlp(lambda s, y: torch.mul(*y.split(s.part, -1)), 8, 4, part=4), X, {"a.weight": 4}),
    "split by sizes held": (
        lambda: Net(
            lambda s, x: s.b((p := s.a(x).split(s.parts, -1))[0]) + s.c(p[1]),
            a=nn.Linear(6, 9),
            b=nn.Linear(4, 3),
            c=nn.Linear(5, 3),
            parts=[4, 5],
        ),
        X,
        {"a.weight": 9},
    ),
    "halves by shape": (lambda: Net(halves, a=nn.Linear(6, 8), b=nn.Linear(4, 3), c=nn.Linear(4, 3)), X, {"a.weight": 4}),
    "every other": (lambda: mlp(lambda s, y: y[:, 0::2] - y[:, 1::2], 8, 4), X, {"a.weight": 4}),
    "flip": (lambda: mlp(lambda s, y: y.flip(-1)), X, {"a.weight": 8}),
    "repeat": (lambda: mlp(lambda s, y: y.repeat(1, 2), 8, 16), X, {"a.weight": 8}),
    "repeat_interleave": (lambda: mlp(lambda s, y: y.repeat_interleave(2, 1), 8, 16), X, {"a.weight": 8}),
    "permute and back": (lambda: mlp(lambda s, y: y.t().permute(1, 0).unsqueeze(1).transpose(1, 2).squeeze(2)), X, {"a.weight": 8}),
    "movedim": (lambda: mlp(lambda s, y: y[:, None].movedim(2, 0).movedim(0, -1).squeeze(1)), X, {"a.weight": 8}),
    "batch norm": (lambda: mlp(lambda s, y: F.relu(s.n(y)), n=nn.BatchNorm1d(8)), X, {"a.weight": 8, "n.weight": 8}),
    "layer norm fixes": (lambda: mlp(lambda s, y: s.n(y), n=nn.LayerNorm(8)), X, {}),
    "softmax fixes": (lambda: mlp(lambda s, y: y.softmax(-1)), X, {}),
    "mean over it fixes": (lambda: mlp(lambda s, y: y - y.mean(-1, keepdim=True)), X, {}),
    "max over it fixes": (lambda: mlp(lambda s, y: y - y.max(-1, keepdim=True)[0]), X, {}),
    "normalize fixes": (lambda: mlp(lambda s, y: F.normalize(y, dim=-1)), X, {}),
    "topk fixes": (lambda: mlp(lambda s, y: y.topk(4, -1)[0], 8, 4), X, {}),
    "looked up by number fixes": (lambda: mlp(lambda s, y: y[:, [3, 1, 0, 2]], 8, 4), X, {}),
    "one of them, by number": (lambda: mlp(lambda s, y: y[:, 2:3] * s.w, w=nn.Parameter(torch.ones(8))), X, {"a.weight": 5}),
    "no rule fixes": (lambda: mlp(lambda s, y: torch.fft.fft(y).real), X, {}),
    "constant of its length fixes": (lambda: mlp(lambda s, y: y * torch.arange(8.0)), X, {}),
    "buffer of its length goes along": (lambda: mlp(lambda s, y: y * s.w, w=nn.Buffer(torch.rand(8))), X, {"a.weight": 8}),
    "roll fixes": (lambda: mlp(lambda s, y: y.roll(1, -1)), X, {}),
    "unbind fixes": (lambda: mlp(lambda s, y: torch.stack(y.unbind(1)[::-1], 1)), X, {}),
    "convolution, norm, pool": (
        lambda: conv(lambda s, y: F.max_pool2d(F.relu(s.n(y)), 2), n=nn.BatchNorm2d(8)),
        IMAGE,
        {"a.weight": 8, "n.weight": 8},
    ),
    "instance norm": (lambda: conv(lambda s, y: s.n(y), n=nn.InstanceNorm2d(8, affine=True)), IMAGE, {"a.weight": 8, "n.weight": 8}),
    "group norm fixes": (lambda: conv(lambda s, y: s.n(y), n=nn.GroupNorm(2, 8)), IMAGE, {}),
    "prelu": (lambda: conv(lambda s, y: s.p(y), p=nn.PReLU(8)), IMAGE, {"a.weight": 8, "p.weight": 8}),
    "interpolate": (lambda: conv(lambda s, y: F.interpolate(y, scale_factor=2, mode="bilinear")), IMAGE, {"a.weight": 8}),
    "adaptive pool": (lambda: conv(lambda s, y: F.adaptive_avg_pool2d(y, 2)), IMAGE, {"a.weight": 8}),
    "space by number": (lambda: conv(lambda s, y: y[:, :, [0, 2]][..., 1:3]), IMAGE, {"a.weight": 8}),
    "pixel shuffle": (lambda: conv(lambda s, y: F.pixel_shuffle(y, 2), 8, 2), IMAGE, {"a.weight": 2}),
    "pixel unshuffle": (lambda: conv(lambda s, y: F.pixel_unshuffle(y, 2), 8, 32), IMAGE, {"a.weight": 8}),
    "channel shuffle": (lambda: conv(lambda s, y: F.channel_shuffle(y, 2)), IMAGE, {"a.weight": 4}),
    "flatten": (
        lambda: Net(lambda s, x: s.b(F.relu(s.a(x)).flatten(1)), a=nn.Conv2d(3, 8, 3), b=nn.Linear(288, 3)),
        IMAGE,
        {"a.weight": 8},
    ),
    "flatten space first": (
        lambda: Net(lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1)), a=nn.Conv2d(3, 8, 3), b=nn.Linear(288, 3)),
        IMAGE,
        {"a.weight": 8},
    ),
    "depthwise": (
        lambda: conv(lambda s, y: s.d(y), d=nn.Conv2d(8, 8, 3, groups=8)),
        IMAGE,
        {"a.weight": 8, "d.weight": 8},
    ),
    "depthwise with a multiplier": (
        lambda: conv(lambda s, y: s.d(y), 4, 12, d=nn.Conv2d(4, 12, 3, groups=4)),
        IMAGE,
        {"a.weight": 4, "d.weight": 4},
    ),
    "groups as wholes": (
        lambda: conv(lambda s, y: s.g(y), 12, 8, g=nn.Conv2d(12, 8, 3, groups=4)),
        IMAGE,
        {"a.weight": 4, "g.weight": 4},
    ),
    "groups with channels woven between": (
        lambda: Net(shuffled, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 8, 1, groups=2), c=nn.Conv2d(8, 4, 1), groups=2),
        IMAGE,
        {"a.weight": 2, "b.weight": 4},
    ),
    "transposed convolution": (
        lambda: Net(lambda s, x: s.c(s.b(s.a(x))).mean((2, 3)), a=nn.Conv2d(3, 8, 1), b=nn.ConvTranspose2d(8, 6, 2), c=nn.Conv2d(6, 4, 1)),
        IMAGE,
        {"a.weight": 8, "b.weight": 8},
    ),
    "transposed convolution in groups": (
        lambda: Net(
            lambda s, x: s.c(s.b(s.a(x))).mean((2, 3)), a=nn.Conv2d(3, 8, 1), b=nn.ConvTranspose2d(8, 12, 2, groups=4), c=nn.Conv2d(12, 4, 1)
        ),
        IMAGE,
        {"a.weight": 4, "b.weight": 4},
    ),
    "one dimension": (
        lambda: Net(lambda s, x: s.b(s.a(x[:, 0])).mean(-1), a=nn.Conv1d(8, 6, 3), b=nn.Conv1d(6, 4, 1)),
        IMAGE,
        {"a.weight": 6},
    ),
    "squeeze and excite": (
        lambda: Net(squeeze_excite, a=nn.Conv2d(3, 8, 3), down=nn.Linear(8, 4), up=nn.Linear(4, 8), b=nn.Conv2d(8, 4, 1)),
        IMAGE,
        {"a.weight": 8, "down.weight": 4, "up.weight": 8},
    ),
    "padded channels, the number held": (
        lambda: Net(
            lambda s, x: s.c(s.b(y := s.a(x)) + F.pad(y, (0, 0, 0, 0, s.extra, s.extra))).mean((2, 3)),
            a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 14, 1), c=nn.Conv2d(14, 4, 1), extra=4,
        ),
        IMAGE,
        {"a.weight": 6, "b.weight": 10},
    ),
    "padded channels, the number written": (
        lambda: Net(
            lambda s, x: s.c(s.b(y := s.a(x)) + F.pad(y, (0, 0, 0, 0, 4, 4))).mean((2, 3)),
            a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 14, 1), c=nn.Conv2d(14, 4, 1),
        ),
        IMAGE,
        {"a.weight": 6, "b.weight": 6},
    ),
    "inside of heads, which is left open": (
        lambda: Net(attention, q=nn.Linear(8, 12), k=nn.Linear(8, 12), v=nn.Linear(8, 12), o=nn.Linear(12, 8), heads=4, scale=0.5),
        TOKENS,
        {"q.weight": 3, "k.weight": 3, "v.weight": 3},
    ),
    "heads, the number held": (
        lambda: Net(attention, q=nn.Linear(8, 12), k=nn.Linear(8, 12), v=nn.Linear(8, 12), o=nn.Linear(12, 8), heads=4, scale=None),
        TOKENS,
        {"q.weight": 4, "k.weight": 4, "v.weight": 4},
    ),
    "heads from one layer": (
        lambda: Net(fused, qkv=nn.Linear(8, 36), o=nn.Linear(12, 8), heads=4, size=3),
        TOKENS,
        {"qkv.weight": 4},
    ),
    "heads in einsum": (
        lambda: Net(einsum, q=nn.Linear(8, 12), k=nn.Linear(8, 12), v=nn.Linear(8, 12), o=nn.Linear(12, 8), size=3),
        TOKENS,
        {"q.weight": 4, "k.weight": 4, "v.weight": 4},
    ),
    "grouped queries": (
        lambda: Net(grouped_queries, q=nn.Linear(8, 12), k=nn.Linear(8, 6), v=nn.Linear(8, 6), o=nn.Linear(12, 8), size=3),
        TOKENS,
        {"q.weight": 2, "k.weight": 2, "v.weight": 2},
    ),
    "matrix product": (
        lambda: Net(lambda s, x: s.a(x) @ s.b(x).transpose(-1, -2), a=nn.Linear(8, 6), b=nn.Linear(8, 6)),
        TOKENS,
        {"a.weight": 6, "b.weight": 6},
    ),
    "weights of one's own": (
        lambda: Net(lambda s, x: torch.addmm(s.c, x @ s.a, s.b), a=nn.Parameter(torch.ones(6, 8)), b=nn.Parameter(torch.ones(8, 3)),
                    c=nn.Parameter(torch.ones(3))),
        X,
        {},
    ),
    "recurrent fixes": (lambda: Net(lambda s, x: s.b(s.r(x)[0][:, -1]), r=nn.LSTM(8, 6, batch_first=True), b=nn.Linear(6, 3)), TOKENS, {}),
    "under no_grad": (lambda: mlp(lambda s, y: y * (s.g * _detached(y.sigmoid())), g=nn.Parameter(torch.ones(8))), X, {"a.weight": 8}),
    "a layer that is not used": (lambda: mlp(lambda s, y: y, spare=nn.Linear(5, 7)), X, {"a.weight": 8}),
    "tied weights": (lambda: tied(), X, {"a.weight": 8, "c.weight": 8}),
}  # fmt: skip


def _detached(y: Tensor) -> Tensor:
    with torch.no_grad():
        return y * 2


def tied() -> nn.Module:
    """Two layers that share one weight, with a width between each."""
    net = Net(lambda s, x: s.b(s.a(x)) + s.d(s.c(x)), a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 8), d=nn.Linear(8, 3))
    net.c.weight = net.a.weight
    return net


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str):
    factory, shape, expected = CASES[name]
    model = lively(factory())
    coupling = check(model, {"x": torch.randn(shape, generator=torch.Generator().manual_seed(1))})
    found = widths(coupling)
    for weight, units in expected.items():
        assert found.get(coupling_name(model, weight), 0) == units, f"{weight}: {found}"
    assert set(found) == {coupling_name(model, weight) for weight in expected} or not expected
    if not expected and name.endswith("fixes"):
        assert "a.weight" not in found
        assert coupling.fixed or coupling.refused


def coupling_name(model: nn.Module, weight: str) -> str:
    """The first name of a tied tensor, which is the one that groups use."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    return next(name for name, tensor in tensors.items() if tensor is tensors[weight])
