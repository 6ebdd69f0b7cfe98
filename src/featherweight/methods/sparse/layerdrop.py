"""sparse.layerdrop: whole blocks are skipped in training, so that the network can be cut to any depth afterwards."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from featherweight.core.context import Context
from featherweight.model.blocks import remove_blocks

from .blocks import BlockSkipping, Finish
from .skipping import evenly


class LayerDrop(BlockSkipping, kind="sparse.layerdrop"):
    """Train while each block is skipped, and not computed, with the same chance; then keep a share of the blocks.

    The network learns to do with any part of its depth. `keep` is the share of those blocks that stays, spread evenly
    (one half: every other); with 1 all stay, and `prune.blocks` can cut to any depth later, without training. Blocks
    are the children of an `nn.Sequential` or `nn.ModuleList` that hand on a tensor of their input's form. Raises
    `TaskError` without training data, `NotFinite` if the loss leaves the finite numbers.
    """

    paper: ClassVar[str] = "arXiv:1909.11556"

    keep: Annotated[float, Field(gt=0, le=1)] = 1.0

    def _plan(self, model: nn.Module, ctx: Context) -> tuple[dict[str, float], Finish]:
        names = self._blocks(model, ctx)[0]
        return dict.fromkeys(names, self.rate), lambda trained: self._cut(trained, names, ctx)

    def _cut(self, model: nn.Module, names: list[str], ctx: Context) -> nn.Module:
        """The model with a share of the named blocks."""
        kept = evenly(len(names), max(1, round(self.keep * len(names))))
        gone = [name for place, name in enumerate(names) if place not in kept]
        for name in gone:
            ctx.change(name, "taken away after training without it now and then")
        if gone and any(isinstance(module, _BatchNorm) for module in model.modules()):
            ctx.warn(
                f"{self.kind}: batch norms hold statistics of networks of all depths; with keep 1 here and "
                "prune.blocks behind it, prune.blocks takes them anew"
            )
        return remove_blocks(model, gone)
