"""experts.prune: the experts that matter least are dropped, and the router chooses among the others."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from ...core.context import Context
from ...core.errors import RecipeError
from ...core.step import Between, OneOf
from ...model.mixtures import keep_experts
from .importance import contributions, usage
from .steps import MixtureStep


class ExpertPrune(MixtureStep, kind="experts.prune"):
    """Drop the experts of each layer that matter least; the router then chooses among those that stay.

    `keep` is the share of the experts that stays. `score` "contribution" is the mean of routing weight times the
    length of the expert's output over the calibration data (REAP), "usage" how many tokens are sent to it. It saves
    memory and disk, not time: a token computes as many experts as before. Raises `RecipeError` where fewer experts
    would stay than a token computes.
    """

    gains: ClassVar[frozenset[str]] = frozenset({"size"})
    paper: ClassVar[str] = "arXiv:2510.13999"

    keep: Annotated[float, Field(gt=0, lt=1), Between(0.25, 0.9)] = 0.5
    score: Annotated[Literal["contribution", "usage"], OneOf("contribution", "usage")] = "contribution"

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        found = self.mixtures(model, ctx)
        worth = (contributions if self.score == "contribution" else usage)(model, found, ctx)
        for each in found:
            count = len(each.experts.members)
            stay = max(1, round(self.keep * count))
            if stay == count:
                ctx.leave(each.name, f"keep={self.keep} of its {count} experts is all of them")
                continue
            kept = sorted(worth[each.name].argsort(descending=True, stable=True)[:stay].tolist())
            try:
                keep_experts(each, kept)
            except ValueError as error:
                raise RecipeError(f"{self.kind}: {each.name}: {error}; raise keep, lower top_k, or skip it") from error
            lost = 1 - float(worth[each.name][kept].sum() / worth[each.name].sum().clamp_min(1e-30))
            numbers = ", ".join(map(str, kept))
            ctx.change(each.name, f"{stay} of {count} experts stay ({numbers}); {lost:.1%} of {self.score} lost")
        self._check_runs(model, ctx)
        return self.finish(model, ctx)

    @torch.no_grad()
    def _check_runs(self, model: nn.Module, ctx: Context) -> None:
        """Raise `RecipeError` where the model does not run any more."""
        try:
            model(**ctx.example)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            why = " ".join(str(error).split())[:100]
            raise RecipeError(
                f"{self.kind}: what surrounds its experts counts on all of them ({why}); use experts.merge, or let the "
                "model give no logits of routers (output_router_logits=False)"
            ) from error
