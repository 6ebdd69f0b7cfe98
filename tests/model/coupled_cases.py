"""One network for each rule, what goes into it, and how many units each weight's outputs can lose."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from coupled_nets import (
    Net,
    attend,
    attention,
    conv,
    detached,
    einsum,
    fused,
    grouped_queries,
    halves,
    linear,
    mlp,
    shuffled,
    squeeze_excite,
    tied,
)
from torch import nn

X, IMAGE, TOKENS = (2, 6), (2, 3, 8, 8), (2, 5, 8)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, int]]] = {
    "pointwise": (lambda: mlp(lambda s, y: F.gelu(y) * 2 + 1), X, {"a.weight": 8}),
    "sigmoid is not zero at zero": (lambda: mlp(lambda s, y: y.sigmoid()), X, {"a.weight": 8}),
    "dropout, clone, to": (
        lambda: mlp(lambda s, y: F.dropout(y, 0.5, s.training).clone().to(torch.float32)),
        X,
        {"a.weight": 8},
    ),
    "scale of its own": (lambda: mlp(lambda s, y: y * s.g, g=nn.Parameter(torch.ones(8))), X, {"a.weight": 8}),
    "residual": (
        lambda: Net(
            lambda s, x: s.d((y := F.relu(s.a(x))) + s.c(F.relu(s.b(y)))), **dict(zip("abcd", linear(6, 8, 10, 8, 3)))
        ),
        X,
        {"a.weight": 8, "b.weight": 10, "c.weight": 8},
    ),
    "in place": (lambda: mlp(lambda s, y: y.mul_(2).relu_()), X, {"a.weight": 8}),
    "cat": (
        lambda: Net(
            lambda s, x: s.c(torch.cat([s.a(x), s.b(x)], 1)), a=nn.Linear(6, 4), b=nn.Linear(6, 5), c=nn.Linear(9, 3)
        ),
        X,
        {"a.weight": 4, "b.weight": 5},
    ),
    "cat with the input": (
        lambda: Net(lambda s, x: s.c(torch.cat([x, s.a(x)], -1)), a=nn.Linear(6, 4), c=nn.Linear(10, 3)),
        X,
        {"a.weight": 4},
    ),
    "stack": (
        lambda: Net(
            lambda s, x: s.c(torch.stack([s.a(x), s.b(x)]).amax(0)),
            a=nn.Linear(6, 4),
            b=nn.Linear(6, 4),
            c=nn.Linear(4, 3),
        ),
        X,
        {"a.weight": 4, "b.weight": 4},
    ),
    "chunk": (lambda: mlp(lambda s, y: torch.mul(*y.chunk(2, -1)), 8, 4), X, {"a.weight": 4}),
    "glu": (lambda: mlp(lambda s, y: F.glu(y), 8, 4), X, {"a.weight": 4}),
    "split by a number held": (
        lambda: mlp(lambda s, y: torch.mul(*y.split(s.part, -1)), 8, 4, part=4),
        X,
        {"a.weight": 4},
    ),
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
    "halves by shape": (
        lambda: Net(halves, a=nn.Linear(6, 8), b=nn.Linear(4, 3), c=nn.Linear(4, 3)),
        X,
        {"a.weight": 4},
    ),
    "every other": (lambda: mlp(lambda s, y: y[:, 0::2] - y[:, 1::2], 8, 4), X, {"a.weight": 4}),
    "flip": (lambda: mlp(lambda s, y: y.flip(-1)), X, {"a.weight": 8}),
    "repeat": (lambda: mlp(lambda s, y: y.repeat(1, 2), 8, 16), X, {"a.weight": 8}),
    "repeat_interleave": (lambda: mlp(lambda s, y: y.repeat_interleave(2, 1), 8, 16), X, {"a.weight": 8}),
    "permute and back": (
        lambda: mlp(lambda s, y: y.t().permute(1, 0).unsqueeze(1).transpose(1, 2).squeeze(2)),
        X,
        {"a.weight": 8},
    ),
    "movedim": (lambda: mlp(lambda s, y: y[:, None].movedim(2, 0).movedim(0, -1).squeeze(1)), X, {"a.weight": 8}),
    "batch norm": (lambda: mlp(lambda s, y: F.relu(s.n(y)), n=nn.BatchNorm1d(8)), X, {"a.weight": 8, "n.weight": 8}),
    "layer norm fixes": (lambda: mlp(lambda s, y: s.n(y), n=nn.LayerNorm(8)), X, {}),
    "softmax fixes": (lambda: mlp(lambda s, y: y.softmax(-1)), X, {}),
    "mean over it fixes": (lambda: mlp(lambda s, y: y - y.mean(-1, keepdim=True)), X, {}),
    "max over it fixes": (lambda: mlp(lambda s, y: y - y.max(-1, keepdim=True)[0]), X, {}),
    "normalize fixes": (lambda: mlp(lambda s, y: F.normalize(y, dim=-1)), X, {}),
    "topk fixes": (lambda: mlp(lambda s, y: y.topk(4, -1)[0], 8, 4), X, {}),
    "looked up by number fixes": (lambda: mlp(lambda s, y: y[:, [3, 1, 0, 2]], 8, 4), X, {}),
    "one of them, by number": (
        lambda: mlp(lambda s, y: y[:, 2:3] * s.w, w=nn.Parameter(torch.ones(8))),
        X,
        {"a.weight": 5},
    ),
    "no rule fixes": (lambda: mlp(lambda s, y: torch.fft.fft(y).real), X, {}),
    "constant of its length fixes": (lambda: mlp(lambda s, y: y * torch.arange(8.0)), X, {}),
    "buffer of its length goes along": (
        lambda: mlp(lambda s, y: y * s.w, w=nn.Buffer(torch.rand(8))),
        X,
        {"a.weight": 8},
    ),
    "roll fixes": (lambda: mlp(lambda s, y: y.roll(1, -1)), X, {}),
    "unbind fixes": (lambda: mlp(lambda s, y: torch.stack(y.unbind(1)[::-1], 1)), X, {}),
    "convolution, norm, pool": (
        lambda: conv(lambda s, y: F.max_pool2d(F.relu(s.n(y)), 2), n=nn.BatchNorm2d(8)),
        IMAGE,
        {"a.weight": 8, "n.weight": 8},
    ),
    "instance norm": (
        lambda: conv(lambda s, y: s.n(y), n=nn.InstanceNorm2d(8, affine=True)),
        IMAGE,
        {"a.weight": 8, "n.weight": 8},
    ),
    "group norm fixes": (lambda: conv(lambda s, y: s.n(y), n=nn.GroupNorm(2, 8)), IMAGE, {}),
    "prelu": (lambda: conv(lambda s, y: s.p(y), p=nn.PReLU(8)), IMAGE, {"a.weight": 8, "p.weight": 8}),
    "interpolate": (
        lambda: conv(lambda s, y: F.interpolate(y, scale_factor=2, mode="bilinear")),
        IMAGE,
        {"a.weight": 8},
    ),
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
        lambda: Net(
            lambda s, x: s.b(s.a(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
            a=nn.Conv2d(3, 8, 3),
            b=nn.Linear(288, 3),
        ),
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
        lambda: Net(
            lambda s, x: s.c(s.b(s.a(x))).mean((2, 3)),
            a=nn.Conv2d(3, 8, 1),
            b=nn.ConvTranspose2d(8, 6, 2),
            c=nn.Conv2d(6, 4, 1),
        ),
        IMAGE,
        {"a.weight": 8, "b.weight": 8},
    ),
    "transposed convolution in groups": (
        lambda: Net(
            lambda s, x: s.c(s.b(s.a(x))).mean((2, 3)),
            a=nn.Conv2d(3, 8, 1),
            b=nn.ConvTranspose2d(8, 12, 2, groups=4),
            c=nn.Conv2d(12, 4, 1),
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
        lambda: Net(
            squeeze_excite, a=nn.Conv2d(3, 8, 3), down=nn.Linear(8, 4), up=nn.Linear(4, 8), b=nn.Conv2d(8, 4, 1)
        ),
        IMAGE,
        {"a.weight": 8, "down.weight": 4, "up.weight": 8},
    ),
    "padded channels, the number held": (
        lambda: Net(
            lambda s, x: s.c(s.b(y := s.a(x)) + F.pad(y, (0, 0, 0, 0, s.extra, s.extra))).mean((2, 3)),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 14, 1),
            c=nn.Conv2d(14, 4, 1),
            extra=4,
        ),
        IMAGE,
        {"a.weight": 6, "b.weight": 10},
    ),
    "padded channels, the number written": (
        lambda: Net(
            lambda s, x: s.c(s.b(y := s.a(x)) + F.pad(y, (0, 0, 0, 0, 4, 4))).mean((2, 3)),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 14, 1),
            c=nn.Conv2d(14, 4, 1),
        ),
        IMAGE,
        {"a.weight": 6, "b.weight": 6},
    ),
    "inside of heads, which is left open": (
        lambda: attend(attention, 12, heads=4, scale=0.5),
        TOKENS,
        {"q.weight": 3, "k.weight": 3, "v.weight": 3},
    ),
    "heads, the number held": (
        lambda: attend(attention, 12, heads=4, scale=None),
        TOKENS,
        {"q.weight": 4, "k.weight": 4, "v.weight": 4},
    ),
    "heads from one layer": (
        lambda: Net(fused, qkv=nn.Linear(8, 36), o=nn.Linear(12, 8), heads=4, size=3),
        TOKENS,
        {"qkv.weight": 4},
    ),
    "heads in einsum": (lambda: attend(einsum, 12, size=3), TOKENS, {"q.weight": 4, "k.weight": 4, "v.weight": 4}),
    "grouped queries": (
        lambda: attend(grouped_queries, 6, size=3),
        TOKENS,
        {"q.weight": 2, "k.weight": 2, "v.weight": 2},
    ),
    "matrix product": (
        lambda: Net(lambda s, x: s.a(x) @ s.b(x).transpose(-1, -2), a=nn.Linear(8, 6), b=nn.Linear(8, 6)),
        TOKENS,
        {"a.weight": 6, "b.weight": 6},
    ),
    "weights of one's own": (
        lambda: Net(
            lambda s, x: torch.addmm(s.c, x @ s.a, s.b),
            a=nn.Parameter(torch.ones(6, 8)),
            b=nn.Parameter(torch.ones(8, 3)),
            c=nn.Parameter(torch.ones(3)),
        ),
        X,
        {},
    ),
    "lstm": (
        lambda: Net(
            lambda s, x: s.b(s.r(s.a(x))[0][:, -1]),
            a=nn.Linear(8, 5),
            r=nn.LSTM(5, 6, batch_first=True),
            b=nn.Linear(6, 3),
        ),
        TOKENS,
        {"a.weight": 5},
    ),
    "two layers of gru, both ways": (
        lambda: Net(
            lambda s, x: s.c(s.b(s.r(x)[0]).mean(1)),
            r=nn.GRU(8, 6, 2, bidirectional=True, batch_first=True),
            b=nn.Linear(12, 7),
            c=nn.Linear(7, 3),
        ),
        TOKENS,
        {"b.weight": 7},
    ),
    "a first state of its own": (
        lambda: Net(
            lambda s, x: s.b(s.r(x, s.start.expand(1, 2, -1).contiguous())[1][0]),
            r=nn.RNN(8, 6, batch_first=True),
            b=nn.Linear(6, 3),
            start=nn.Parameter(torch.ones(1, 1, 6)),
        ),
        TOKENS,
        {},
    ),
    "a recurrent layer with projections": (
        lambda: Net(
            lambda s, x: s.b(s.r(x)[0]).mean(1), r=nn.LSTM(8, 6, proj_size=4, batch_first=True), b=nn.Linear(4, 3)
        ),
        TOKENS,
        {},
    ),
    "under no_grad": (
        lambda: mlp(lambda s, y: y * (s.g * detached(y.sigmoid())), g=nn.Parameter(torch.ones(8))),
        X,
        {"a.weight": 8},
    ),
    "a layer that is not used": (lambda: mlp(lambda s, y: y, spare=nn.Linear(5, 7)), X, {"a.weight": 8}),
    "tied weights": (lambda: tied(), X, {"a.weight": 8, "c.weight": 8}),
}
