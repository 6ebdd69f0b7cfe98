"""experts.route: the experts of an existing model as layers of their own, and how many of them a token computes."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from ...core.context import Context
from ...core.errors import RecipeError
from ...model.experts import Router
from .steps import MixtureStep


class ExpertRoute(MixtureStep, kind="experts.route"):
    """Hold each expert of a model in linear layers of its own, and set how many of them each token is sent to.

    Experts whose weights lie in stacks (Mixtral, Qwen-MoE and the like) are known by how they are called; what is put
    in their place gives the same outputs, and can be quantized, pruned and factored expert by expert. `top_k` None
    leaves the number of experts of a token as it is, `capacity` None how many tokens an expert takes: with a number, at
    most that factor times its even share, and the rest are dropped. Raises `RecipeError` for more than there are.
    """

    gains: ClassVar[frozenset[str]] = frozenset({"latency", "energy"})
    paper: ClassVar[str] = "arXiv:2101.03961"

    top_k: Annotated[int, Field(ge=1)] | None = None
    capacity: Annotated[float, Field(gt=0)] | None = None

    @classmethod
    def sample(cls) -> dict[str, Any]:
        return {"top_k": 1}

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        for each in self.mixtures(model, ctx, routed=False):
            how = f"{len(each.experts.members)} experts in layers of their own"
            if self.top_k is not None:
                if isinstance(each.router, Router):
                    how += self._limit(each.name, each.router)
                else:
                    ctx.leave(
                        f"{each.name} (top_k)",
                        "its router does more than choose by a linear score, or gives the model more",
                    )
            if self.capacity is not None:
                each.experts.capacity = self.capacity
            ctx.change(each.name, how + (f", capacity factor {self.capacity:g}" if self.capacity else ""))
        return self.finish(model, ctx)

    def _limit(self, name: str, router: Router) -> str:
        """Let the router choose `top_k`; what that changes, in words."""
        assert self.top_k is not None
        if self.top_k > router.experts:
            raise RecipeError(
                f"{self.kind}: top_k={self.top_k}, but {name} has {router.experts} experts; choose at most that"
            )
        before, router.top_k = router.top_k, self.top_k
        return f", {self.top_k} of them for each token instead of {before}"
