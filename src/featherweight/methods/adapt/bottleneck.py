"""adapt.bottleneck: a narrow network with a shortcut around it behind chosen linear layers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from featherweight.core.context import Context
from featherweight.core.errors import RecipeError
from featherweight.model.adapters import Bottleneck
from featherweight.model.replacing import exchanged

from .training import AdapterStep


class BottleneckAdapters(AdapterStep, kind="adapt.bottleneck"):
    """Train a narrow network behind each chosen linear layer, with the base frozen in the form it is stored in.

    Its `size` is how many values it passes through; it starts as nothing. The paper puts one behind the last linear
    layer of each attention and each feed-forward network: `only` chooses these. No linear layer is equal to it, so it
    stays in the model.
    """

    paper: ClassVar[str] = "arXiv:1902.00751"

    size: Annotated[int, Field(ge=1, le=4096)] = 8
    activation: Literal["gelu", "relu"] = "gelu"

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        layers = self.chosen(model, ctx)
        if not layers:
            return model
        widest = max(layer.out_features for layer in layers.values())
        if self.size >= widest:
            raise RecipeError(
                f"{self.kind}: size={self.size} is no bottleneck behind layers of at most {widest} outputs; lower it"
            )
        trained: list[nn.Parameter] = []
        for name, layer in layers.items():
            made = self._behind(layer).to(ctx.device)
            model = exchanged(model, name, made)
            trained += [each for own, each in made.named_parameters() if not own.startswith("base.")]
            ctx.change(name, f"a bottleneck of {made.size} behind it")
        loss = self.learn(model, trained, ctx)
        for name in layers:
            ctx.change(name, f"{ctx.record.changed[name]}, last loss {loss:.4g}")
        return model

    def _behind(self, layer: nn.Linear) -> Bottleneck:
        made = Bottleneck(layer.out_features, min(self.size, max(1, layer.out_features // 2)), self.activation)
        made.to(layer.weight.dtype).base = layer
        return made
