"""What the steps on mixtures of experts share: which layers they work on, and what they say of the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from ...core.context import Context
from ...core.errors import RecipeError
from ...core.fit import Training
from ...core.step import Place, Trait
from ...model.coverage import coverage_of
from ...model.experts import Router
from ...model.feedforwards import Found, feed_forwards
from ...model.matrices import CONVOLUTIONS, TRANSPOSED
from ...model.mixtures import Mixture, looped, mixtures
from ...model.select import LayerStep, excluded, patterns
from .training import balanced

WEIGHTED = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)


class ExpertStep(LayerStep):
    """A step on feed-forwards or on experts; with `retrain` the network is then trained.

    `balance` and `z` weigh the load-balancing and the router z-loss of that training.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    retrain: Training | None = None
    balance: Annotated[float, Field(ge=0)] = 0.01
    z: Annotated[float, Field(ge=0)] = 0.001

    def finish(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Retrain, and record who is routed where."""
        if not ctx.record.changed:
            return model
        if self.retrain is not None:
            if (self.balance or self.z) and not any(isinstance(module, Router) for module in model.modules()):
                ctx.warn(f"{self.kind}: balance and z add nothing: no router here chooses by a linear score alone")
            text = f"retraining after {self.kind}"
            ctx.fit(model, self.retrain, balanced(self.retrain.term(), self.balance, self.z), text=text)
        for name, each in coverage_of(model, ctx).items():
            ctx.change(f"{name} (coverage)", str(each))
        return model

    def picked(self, names: Iterable[str]) -> str | None:
        """Why what goes by these names is not chosen; None if it is."""
        reasons = [excluded(name, self.only, self.skip) for name in names]
        skipped = next((each for each in reasons if each is not None and each.startswith("excluded")), None)
        return skipped or (None if None in reasons else reasons[0])

    def leave_rest(self, model: nn.Module, ctx: Context, known: Iterable[str], why: str) -> None:
        """Report every layer that is not within one of the `known` modules as left alone, unless it is already."""
        inside = tuple(f"{name}." for name in known)
        told = {*ctx.record.changed, *(left.layer for left in ctx.record.left)}
        for name, module in model.named_modules():
            if isinstance(module, WEIGHTED) and name not in told and not f"{name}.".startswith(inside or ("\n",)):
                ctx.leave(name, excluded(name, self.only, self.skip) or why)

    def warn_unused(self, names: Iterable[str], ctx: Context) -> None:
        """Warn of globs that match none of these names."""
        every = list(names)
        for glob in (*patterns(self.only), *self.skip):
            if glob != "*" and all(excluded(name, glob) for name in every):
                ctx.warn(f"{self.kind}: no layer matches {glob!r}")


class DenseStep(ExpertStep):
    """A step that puts experts in place of dense feed-forwards."""

    def chosen(self, model: nn.Module, ctx: Context) -> list[Found]:
        """The chosen feed-forwards; all other layers are reported as left alone."""
        found, reasons = feed_forwards(model, ctx)
        for inside in (f"{name}." for name in looped(model, ctx)):
            for name in [name for each in found if each.place.startswith(inside) for name in each.layers]:
                reasons[name] = "is in a mixture of experts already, which experts.route opens"
            found = [each for each in found if not each.place.startswith(inside)]
        chosen = [each for each in found if self.picked((each.place, *each.layers)) is None]
        named = [name for name, module in model.named_modules() if isinstance(module, WEIGHTED)]
        self.warn_unused([*named, *(each.place for each in found)], ctx)
        for name, why in reasons.items():
            ctx.leave(name, why)
        why = "is in no feed-forward: two linear layers with a module of activation between them, or three with a gate"
        for each in found:
            for name in each.layers if each not in chosen else ():
                ctx.leave(name, self.picked((each.place, *each.layers)) or why)
        self.leave_rest(model, ctx, [name for each in chosen for name in each.layers], why)
        return chosen

    def divided(self, found: list[Found], experts: int, ctx: Context) -> list[Found]:
        """Those of which `experts` divides the neurons; raises `RecipeError` if it divides none."""
        widths = {each.place: each.parts.up.out_features for each in found}
        fitting = [each for each in found if widths[each.place] % experts == 0]
        if found and not fitting:
            width = min(widths.values())
            some = ", ".join(str(size) for size in range(2, width) if width % size == 0)
            raise RecipeError(
                f"{self.kind}: experts={experts} divides no feed-forward (neurons: "
                f"{', '.join(str(each) for each in sorted(set(widths.values())))}); choose a divisor of {width}: {some}"
            )
        for each in found:
            for name in each.layers if each not in fitting else ():
                ctx.leave(name, f"experts={experts} does not divide its {widths[each.place]} neurons")
        return fitting


class MixtureStep(ExpertStep):
    """A step on the experts that a model has."""

    place: ClassVar[Place | None] = None  # it needs a model with experts, which the search does not know of

    def mixtures(self, model: nn.Module, ctx: Context, routed: bool = True) -> list[Mixture]:
        """The chosen mixtures, with a router if `routed`; all other layers are reported as left alone."""
        found, refused = mixtures(model, ctx, lambda name: self.picked([name]))
        for name, why in refused.items():
            ctx.leave(name, why)
        self.warn_unused([name for name, _ in model.named_modules()], ctx)
        chosen: list[Mixture] = []
        for each in found:
            if routed and each.router is None:
                ctx.leave(each.name, each.why)
            else:
                chosen.append(each)
        self.leave_rest(model, ctx, [each.name for each in found], "is in no mixture of experts")
        return chosen
