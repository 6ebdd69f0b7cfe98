"""sparse.stochastic_depth: residual blocks are skipped in training, the deeper the more often."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from featherweight.core.context import Context
from featherweight.core.outputs import first
from featherweight.core.soft import Mask
from featherweight.model.masks import links_of

from .blocks import BlockSkipping, Finish
from .residual import branch_ends, first_call, owners
from .skipping import handed_on, linear_decay


class StochasticDepth(BlockSkipping, kind="sparse.stochastic_depth"):
    """Train while residual blocks are skipped, and not computed; then scale each branch by how often it was there.

    The chance of a block rises with its place to `rate` at the last one. Afterwards the last layer of each residual
    branch is multiplied by the share of the steps in which the block is expected to run, which is the paper's rule for
    testing put into the weights. A block counts as residual if it gives its input back when its parameters are zero,
    which is tried. Raises `TaskError` without training data, `NotFinite` if the loss leaves the finite numbers.
    """

    paper: ClassVar[str] = "arXiv:1603.09382"

    rate: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def _plan(self, model: nn.Module, ctx: Context) -> tuple[dict[str, float], Finish]:
        blocks, rows = self._blocks(model, ctx)
        ends = self._ends(model, blocks, ctx)
        for name in blocks:
            if not ends[name]:
                ctx.leave(name, "none of its layers can be scaled so that what it adds to its input is")
        chances = dict(zip(rows, linear_decay(len(rows), self.rate)))
        rates = {name: chances[name] for name in blocks if ends[name]}
        return rates, lambda trained: self._scale(trained, rates, ends, ctx)

    def _ends(self, model: nn.Module, blocks: list[str], ctx: Context) -> dict[str, list[str]]:
        """The last layer of each residual branch of each block; none where one cannot be scaled."""
        calls = first_call(model, blocks, lambda: model(**ctx.example))
        found: dict[str, list[str]] = {}
        for name in blocks:
            block, (given, named) = model.get_submodule(name), calls[name]

            def run(block: nn.Module = block, given: Any = given, named: Any = named) -> tuple[Tensor, Tensor]:
                return handed_on(given, named), first(block(*given, **named))

            ends = branch_ends(block, run)
            found[name] = ends if all(_scalable(block.get_submodule(end)) for end in ends) else []
        return found

    @torch.no_grad()
    def _scale(self, model: nn.Module, rates: dict[str, float], ends: dict[str, list[str]], ctx: Context) -> nn.Module:
        """The model whose branches are scaled by how often they were there; their `ends` do not change in training."""
        for name, rate in rates.items():
            own = owners(model.get_submodule(name))
            for parameter in (parameter for end in ends[name] for parameter in own[end]):
                parameter.mul_(1 - rate)
            where = ", ".join(end or type(model.get_submodule(name)).__name__ for end in ends[name])
            ctx.change(name, f"skipped with a chance of {rate:.1%}; {where} scaled by {1 - rate:.3g}")
        return model


def _scalable(module: nn.Module) -> bool:
    """Whether scaling a module's parameters scales what it gives: a weight held in another form may not follow."""
    return all(isinstance(link, Mask) for link in links_of(module))
