"""adapt.lora: low-rank updates beside linear layers, with or without magnitudes of their own (LoRA, DoRA)."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from featherweight.core.context import Context
from featherweight.core.errors import RecipeError
from featherweight.core.step import Between, OneOf, Place
from featherweight.model.adapters import LowRank, low_rank

from . import peft
from .merging import MergingStep


class LowRankAdaptation(MergingStep, kind="adapt.lora"):
    """Train an update of low rank beside each chosen linear layer, with the base frozen in the form it is stored in.

    The update of a weight is `alpha / rank` times a product of two matrices with `rank` columns and rows, of which the
    second starts at 0; `dropout` acts on its inputs in training. A layer narrower than `rank` gets the rank that it
    has. `dora` trains the length of each row apart from its direction (arXiv:2402.09353). peft does the mathematics.
    For `merge` and `bound` see `MergingStep`.
    """

    place: ClassVar[Place | None] = Place.HEAL
    paper: ClassVar[str] = "arXiv:2106.09685"
    packages: ClassVar[tuple[str, ...]] = ("peft",)
    extra: ClassVar[str] = "adapters"

    rank: Annotated[int, Field(ge=1, le=1024), Between(2, 32, log=True)] = 8
    alpha: Annotated[float | None, Field(gt=0)] = None  # None: twice the rank
    dora: Annotated[bool, OneOf(False, True)] = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        layers = self.chosen(model, ctx)
        if not layers:
            return model
        ranks = self._ranks(layers)
        model = peft.put_around(model, self._config(layers, ranks), layers)
        around = [model.get_submodule(name) for name in layers]
        trained = [each for layer in around for each in _own(layer)]
        loss = self.learn(model, trained, ctx)
        for name, made in peft.taken_off(model, layers, _turned).items():
            kind = "DoRA" if self.dora else "LoRA"
            ctx.change(name, f"{kind} of rank {ranks[name]}, {_count(made):,} parameters, last loss {loss:.4g}")
        return self.merged(model, list(layers), ctx)

    def _ranks(self, layers: dict[str, nn.Linear]) -> dict[str, int]:
        """The rank of each layer; raises `RecipeError` if none of them has the one asked for."""
        widest = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
        most = max(widest.values())
        if self.rank > most:
            raise RecipeError(
                f"{self.kind}: rank={self.rank} is more than any chosen layer has (at most {most}); lower it"
            )
        return {name: min(self.rank, width) for name, width in widest.items()}

    def _config(self, layers: dict[str, nn.Linear], ranks: dict[str, int]) -> Any:
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        other = {name: rank for name, rank in ranks.items() if rank != self.rank}
        return peft.library().LoraConfig(
            r=self.rank,
            lora_alpha=alpha,
            rank_pattern={f"^{peft.pattern([name])}$": rank for name, rank in other.items()},
            alpha_pattern={f"^{peft.pattern([name])}$": alpha * rank / self.rank for name, rank in other.items()},
            target_modules=peft.pattern(layers),
            lora_dropout=self.dropout,
            use_dora=self.dora,
        )


def _own(layer: Any) -> list[nn.Parameter]:
    """The parameters of peft's layer that are not those of the layer it is around."""
    return [each for name, each in layer.named_parameters() if not name.startswith("base_layer.")]


def _count(made: nn.Module) -> int:
    return sum(each.numel() for name, each in made.named_parameters() if not name.startswith("base."))


def _turned(layer: Any) -> LowRank:
    """What stays of peft's layer: the same sum, with its scale in the second matrix."""
    down: Tensor = layer.lora_A[peft.ADAPTER].weight.detach()
    up: Tensor = layer.lora_B[peft.ADAPTER].weight.detach() * layer.scaling[peft.ADAPTER]
    magnitude = None
    if peft.ADAPTER in layer.lora_magnitude_vector:
        magnitude = layer.lora_magnitude_vector[peft.ADAPTER].weight.detach()
    return low_rank(layer.base_layer, down, up, magnitude).eval()
