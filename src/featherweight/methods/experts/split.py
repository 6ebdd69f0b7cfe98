"""experts.split: a dense feed-forward as experts, of which each token computes a few."""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.context import Context
from ...core.errors import RecipeError
from ...core.step import Between, OneOf, Place
from ...model.experts import FeedForward, MixtureOfExperts, Router, experts_of, mixture
from ...model.feedforwards import Found, put_in
from ...model.moments import sampled
from .clusters import balanced_clusters
from .parts import activity, energies, fitted_router, needs, part, unselected_means
from .steps import DenseStep

HELD = 2**28  # values of inputs that are held at once


class ExpertSplit(DenseStep, kind="experts.split"):
    """Cut each feed-forward into experts of neurons that act together, and compute for each token only those it needs.

    `experts` parts of equal size are made, of which `keep` is the share that a token computes; `shared` of them, of
    the neurons with most energy, are computed by every token. `by` "activation" groups neurons that act on the same
    tokens, "weights" those with like rows of weights. The router is linear, fitted (without labels) to how far each
    expert's output is from its mean, on `rows` inputs of the calibration data; an expert that is left out counts as
    its mean over the tokens that leave it out. With all experts computed the model is the one before. Raises
    `RecipeError` if `experts` divides no feed-forward.
    """

    place: ClassVar[Place | None] = Place.RESHAPE
    gains: ClassVar[frozenset[str]] = frozenset({"latency", "energy"})
    paper: ClassVar[str] = "arXiv:2110.01786"

    keep: Annotated[float, Field(gt=0, lt=1), Between(0.25, 0.75)] = 0.5
    experts: Annotated[int, Field(ge=2), OneOf(4, 8)] = 4
    shared: Annotated[int, Field(ge=0)] = 0
    by: Annotated[Literal["activation", "weights"], OneOf("activation", "weights")] = "activation"
    rows: Annotated[int, Field(ge=64)] = 8192

    @property
    def top_k(self) -> int:
        """How many experts a token is sent to, beside those shared."""
        return max(1, round(self.keep * self.experts) - self.shared)

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        self._check()
        waiting = self.divided(self.chosen(model, ctx), self.experts, ctx)
        while waiting:
            width = max(each.parts.up.in_features for each in waiting)
            some, waiting = (
                waiting[: max(1, HELD // (self.rows * width))],
                waiting[max(1, HELD // (self.rows * width)) :],
            )
            given = sampled(model, [_reads(each) for each in some], ctx, self.rows)
            for each in some:
                made, how = self._made(each, given[_reads(each)], ctx)
                model = put_in(model, each, made)
                for name in each.layers:
                    ctx.change(name, how)
        return self.finish(model, ctx)

    def _check(self) -> None:
        """Raise `RecipeError` where the numbers of experts leave nothing to choose."""
        computed = round(self.keep * self.experts)
        if self.shared and self.shared >= computed:
            raise RecipeError(
                f"{self.kind}: keep={self.keep} of experts={self.experts} is {computed}, and shared={self.shared} "
                "leaves none of these to choose; give a larger keep, more experts, or fewer shared ones"
            )
        if computed >= self.experts:
            raise RecipeError(
                f"{self.kind}: keep={self.keep} of experts={self.experts} computes all that are not shared; "
                "give more experts, or a smaller keep"
            )

    @torch.no_grad()
    def _made(self, found: Found, tokens: Tensor, ctx: Context) -> tuple[MixtureOfExperts, str]:
        """The mixture in place of one feed-forward, and how it came about."""
        kind = found.parts.up.weight.dtype
        exactly = torch.promote_types(kind, torch.float32)  # what is fitted and solved has no half precision
        whole, tokens = copy.deepcopy(found.parts).to(exactly), tokens.to(exactly)
        hidden, down = whole.inner(tokens), whole.down.weight
        shared, sets = self._sets(whole, hidden, ctx.generator(found.place))
        outputs = [hidden[:, each] @ down[:, each].T for each in sets]
        means = torch.stack([each.mean(0) for each in outputs])
        router = Router(tokens.shape[1], len(sets), self.top_k, "one").to(tokens)
        weight, bias = fitted_router(tokens, needs(hidden, down, sets, means))
        router.weight.copy_(weight)
        router.bias.copy_(bias)
        logits, _, indices = router(tokens)
        selected = torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)
        means = torch.stack([unselected_means(each, selected[:, e]) for e, each in enumerate(outputs)])
        offset = means.sum(0) if whole.down.bias is None else means.sum(0) + whole.down.bias
        members = [part(whole, each, -mean) for each, mean in zip(sets, means)]
        common = part(whole, shared) if self.shared else None
        made = mixture(router, experts_of(members, plain=True), common, offset)
        exact = whole(tokens)
        missed = (made(tokens) - exact).square().sum() / (exact - exact.mean(0)).square().sum().clamp_min(1e-30)
        share = (self.top_k + self.shared) / self.experts
        how = f"{self.top_k} of {len(sets)} experts of {len(sets[0])} neurons"
        how += f" and {len(shared)} shared neurons" if self.shared else ""
        return made.to(kind), f"{how} ({share:.0%} of the neurons), {float(missed):.1%} of the outputs' variance missed"

    def _sets(self, whole: FeedForward, hidden: Tensor, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """The shared neurons, and those of each expert."""
        down = whole.down.weight
        size = hidden.shape[1] // self.experts
        order = energies(hidden, down).argsort(descending=True, stable=True)
        shared, rest = order[: self.shared * size].sort().values, order[self.shared * size :].sort().values
        features = activity(hidden, down) if self.by == "activation" else _rows(whole)
        count = self.experts - self.shared
        owner = balanced_clusters(features[rest].cpu(), count, generator).to(rest.device)
        return shared, [rest[owner == place] for place in range(count)]


def _reads(found: Found) -> str:
    """The module whose input is that of the feed-forward."""
    return found.emptied[0] if found.emptied else found.place


def _rows(whole: FeedForward) -> Tensor:
    """The rows of weights of each neuron, each of length one."""
    layers = [whole.up] if whole.gate is None else [whole.gate, whole.up]
    return nn.functional.normalize(torch.cat([layer.weight for layer in layers], 1).double(), dim=1)
