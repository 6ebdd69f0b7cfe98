"""experts.copy: sparse upcycling, a dense feed-forward copied into experts that training then makes unlike."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from ...core.context import Context
from ...core.errors import RecipeError
from ...model.experts import FeedForward, MixtureOfExperts, Router, experts_of, feed_forward, mixture
from ...model.feedforwards import linear, own_activation, put_in
from .steps import DenseStep


class ExpertCopy(DenseStep, kind="experts.copy"):
    """Put copies of each feed-forward in its place as experts, of which a new router chooses `top_k` for each token.

    The weights of a token add up to one, so that the model gives what it gave before; only training (`retrain`, or a
    step behind it) makes the experts unlike, and the model better than it was. It makes the model larger and slower:
    `noise` (a share of each weight's spread) makes the copies unlike from the start. With `capacity` an expert takes
    at most that factor times its even share of the tokens.
    """

    gains: ClassVar[frozenset[str]] = frozenset({"accuracy"})
    paper: ClassVar[str] = "arXiv:2212.05055"

    experts: Annotated[int, Field(ge=2)] = 4
    top_k: Annotated[int, Field(ge=1)] = 2
    noise: Annotated[float, Field(ge=0)] = 0.0
    capacity: Annotated[float, Field(gt=0)] | None = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        if self.top_k > self.experts:
            raise RecipeError(
                f"{self.kind}: top_k={self.top_k} is more than experts={self.experts}; choose at most that"
            )
        if self.top_k == 1:
            ctx.warn(
                f"{self.kind}: with top_k=1 every weight is one: training moves the router by its own losses alone"
            )
        for each in self.chosen(model, ctx):
            made = self._made(each.parts, ctx.generator(each.place)).to(ctx.device)
            model = put_in(model, each, made)
            for name in each.layers:
                ctx.change(name, f"{self.experts} copies, of which a token computes {self.top_k}")
        return self.finish(model, ctx)

    @torch.no_grad()
    def _made(self, whole: FeedForward, generator: torch.Generator) -> MixtureOfExperts:
        inputs = whole.up.in_features
        router = Router(inputs, self.experts, self.top_k, "selected").to(whole.up.weight)
        router.weight.copy_(torch.randn(self.experts, inputs, generator=generator) * inputs**-0.5)
        members = [self._copy(whole, generator) for _ in range(self.experts)]
        return mixture(router, experts_of(members, self.capacity))

    def _copy(self, whole: FeedForward, generator: torch.Generator) -> FeedForward:
        def layer(given: nn.Linear) -> nn.Linear:
            weight = given.weight.detach()
            spread = self.noise * weight.std(correction=0)
            noise = torch.randn(weight.shape, generator=generator).to(weight) * spread
            return linear(weight + noise, given.bias)

        gate = None if whole.gate is None else layer(whole.gate)
        return feed_forward(layer(whole.up), own_activation(whole.act), layer(whole.down), gate)
