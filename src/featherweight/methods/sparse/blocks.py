"""Training in which residual blocks are skipped: what LayerDrop and stochastic depth share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from featherweight.core.context import Context
from featherweight.core.fit import Training
from featherweight.core.step import Trait
from featherweight.model.blocks import find_blocks
from featherweight.model.masks import TYPES
from featherweight.model.select import LayerStep, excluded, unused

from .skipping import Draw, skipping, wraps

Finish = Callable[[nn.Module], nn.Module]  # the trained model -> the model that is left


class BlockSkipping(LayerStep, Training):
    """Train while blocks that give their input's form back are skipped at random, batch by batch, and not computed.

    `rate` is how often. `only` and `skip` choose blocks by their full names; see `featherweight.model.blocks` for what
    counts as one.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.TRAINABLE
    trains: ClassVar[bool] = True

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.2

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        rates, finish = self._plan(model, ctx)
        self._leave_rest(model, list(rates), ctx)
        if not rates:
            return model
        draw = Draw(rates, ctx.generator(f"{self.kind}: blocks"))
        with skipping(model, wraps(model, list(rates), lambda: model(**ctx.example)), draw.skipped):
            loss = ctx.fit(model, self, during=draw.during, text=self.kind)
        share = sum(draw.drawn.values()) / (draw.steps * len(rates))
        ctx.change("*", f"trained for {self.epochs:g} epochs, {share:.1%} of the blocks skipped, last loss {loss:.4g}")
        for name in rates:
            ctx.change(name, f"skipped in {draw.drawn.get(name, 0)} of {draw.steps} steps")
        return finish(model)

    def _plan(self, model: nn.Module, ctx: Context) -> tuple[dict[str, float], Finish]:
        """How often each block is skipped, by name in the order of the network, and what is done after training."""
        raise NotImplementedError(f"{type(self).__name__} must say how often blocks are skipped")

    def _blocks(self, model: nn.Module, ctx: Context) -> tuple[list[str], list[str]]:
        """The blocks that are skipped, and all that stand in rows; every other one is reported as left alone."""
        for glob in unused(model, (nn.Module,), self.only, self.skip):
            ctx.warn(f"{self.kind}: no layer matches {glob!r}")
        found = find_blocks(model.to(ctx.device).eval(), ctx.example)
        single = wraps(model, found.blocks, lambda: model(**ctx.example))
        left = found.left | {
            name: "it gives several tensors, which cannot be had without computing it"
            for name in found.blocks
            if name not in single
        }
        left |= {name: why for name in found.blocks if (why := excluded(name, self.only, self.skip))}
        for name, reason in left.items():
            ctx.leave(name, reason)
        rows = [name for name, _ in model.named_modules() if name in left or name in found.blocks]
        return [name for name in found.blocks if name not in left], rows

    def _leave_rest(self, model: nn.Module, blocks: list[str], ctx: Context) -> None:
        """Report the layers outside of all blocks that are skipped."""
        for name, module in model.named_modules():
            if isinstance(module, TYPES) and not any(name.startswith(f"{block}.") for block in blocks):
                reason = excluded(name, self.only, self.skip)
                ctx.leave(name, reason or "it stands in no block that is skipped")

    @classmethod
    def sample(cls) -> dict[str, Any]:
        """Settings with which it shows what it does on a small task."""
        return {"epochs": 2}
