"""Layers of a mixture of experts: feed-forwards of which each token is sent to a few, and what sends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.whole import Selective
from .dispatch import combine, dispatch, split_rows

Scores = Literal["softmax", "selected", "sigmoid", "one"]
WAYS: tuple[tuple[Scores, bool], ...] = (  # scores, and whether a token's weights add up to one, that models come with
    ("selected", False), ("softmax", False), ("sigmoid", False), ("sigmoid", True),
)  # fmt: skip


class FeedForward(nn.Module):
    """Two linear layers with an activation between them, `down(act(up(x)))`, or three, `down(act(gate(x)) * up(x))`.

    `feed_forward` puts its parts in. Takes [..., inputs], gives [..., outputs].
    """

    up: nn.Linear
    act: nn.Module
    down: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self.gate: nn.Linear | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            made: Tensor = self.down(self.act(self.up(x)))
        else:
            made = self.down(self.act(self.gate(x)) * self.up(x))
        return made

    def inner(self, x: Tensor) -> Tensor:
        """What `down` gets: [..., neurons]."""
        made: Tensor = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)
        return made


def feed_forward(up: nn.Linear, act: nn.Module, down: nn.Linear, gate: nn.Linear | None = None) -> FeedForward:
    """The feed-forward of these parts."""
    made = FeedForward()
    if gate is not None:
        made.gate = gate
    made.up, made.act, made.down = up, act, down
    return made


class Router(nn.Module):
    """Chooses `top_k` of the experts for each token by a linear score: [n, inputs] to logits, weights and indices.

    `scores` says what an expert's output is weighed with: "softmax" over all experts, over those "selected", each by
    its "sigmoid", or "one" (experts that are parts of one layer add up). With `normalise` the weights of a token add
    up to one. It is no linear layer: what quantizes those leaves it in floats.
    """

    def __init__(self, inputs: int, experts: int, top_k: int, scores: Scores = "softmax", normalise: bool = False):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} is not from 1 to {experts}, the number of experts")
        self.inputs, self.experts, self.top_k = inputs, experts, top_k
        self.scores, self.normalise = scores, normalise
        self.weight = nn.Parameter(torch.empty(experts, inputs).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(experts))

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.experts}, top_k={self.top_k}, scores={self.scores}, normalise={self.normalise}"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(x, self.weight, self.bias)
        return logits, *chosen(logits, self.top_k, self.scores, self.normalise)


def chosen(logits: Tensor, top_k: int, scores: Scores, normalise: bool = False) -> tuple[Tensor, Tensor]:
    """Weights and indices [n, top_k] of the experts that a token is sent to, from logits [n, experts]; see `Router`.

    Weights of logits in half precision are float32, as those of Mixtral are.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    values, indices = logits.topk(top_k, -1)
    if scores == "selected":
        weights = values.softmax(-1)
    elif scores == "softmax":
        weights = torch.exp(values - logits.logsumexp(-1, keepdim=True))
    else:
        weights = values.sigmoid() if scores == "sigmoid" else torch.ones_like(values)
    return (weights / weights.sum(-1, keepdim=True) if normalise else weights), indices


class Experts(Selective):
    """Feed-forwards, each computing only the tokens that are sent to it; `experts_of` puts them in.

    Called with tokens [n, inputs], `indices` [n, k] of the experts of each and `weights` [n, k] of their outputs, it
    gives the weighted sums [n, outputs]. `table` says which feed-forward stands for each index, where several have
    become one. With `capacity` each takes at most that factor times its even share of the tokens; what is beyond that
    is dropped (adds nothing). With `plain` the weights are all one, and are not multiplied with.
    """

    def __init__(self, capacity: float | None = None, plain: bool = False, table: Sequence[int] | None = None):
        super().__init__()
        self.capacity, self.plain = capacity, plain
        self.table = None if table is None else tuple(table)

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, plain={self.plain}, table={self.table}"

    @property
    def members(self) -> list[nn.Module]:
        """The feed-forwards in order."""
        return list(self.children())

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        members = self.members
        found = dispatch(self.placed(indices), len(members), self.capacity)
        if self.observed_whole:
            tokens = torch.split(found.tokens, found.counts.tolist())
            parts = [member(x)[rows] for member, rows in zip(members, tokens, strict=True)]
        else:
            parts = split_rows(x[found.tokens], found.counts)
            parts = [member(part) for member, part in zip(members, parts, strict=True)]
        return combine(torch.cat(parts), found.places, None if self.plain else weights, self.capacity is not None)

    def placed(self, indices: Tensor) -> Tensor:
        """Which feed-forward stands for each of `indices`."""
        return indices if self.table is None else torch.tensor(self.table, device=indices.device)[indices]


def experts_of(
    members: Sequence[nn.Module], capacity: float | None = None, plain: bool = False, table: Sequence[int] | None = None
) -> Experts:
    """The layer of these feed-forwards."""
    made = Experts(capacity, plain, table)
    for place, member in enumerate(members):
        made.add_module(str(place), member)
    return made


class MixtureOfExperts(nn.Module):
    """A router and its experts, and optionally a `shared` feed-forward that computes every token, and a `bias`.

    `mixture` puts its parts in. Takes [..., inputs], gives [..., outputs]. Shazeer et al., arXiv:1701.06538.
    """

    router: Router
    experts: Experts
    bias: nn.Parameter | None

    def __init__(self) -> None:
        super().__init__()
        self.shared: nn.Module | None = None
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        _, weights, indices = self.router(tokens)
        result: Tensor = self.experts(tokens, indices, weights)
        if self.shared is not None:
            result = result + self.shared(tokens)
        if self.bias is not None:
            result = result + self.bias
        return result.reshape(*x.shape[:-1], result.shape[-1])


def mixture(
    router: Router, experts: Experts, shared: nn.Module | None = None, bias: Tensor | None = None
) -> MixtureOfExperts:
    """The layer of these parts."""
    made = MixtureOfExperts()
    made.router, made.experts = router, experts
    if shared is not None:
        made.shared = shared
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made
