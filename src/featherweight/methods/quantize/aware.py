"""quantize.aware: training with the integers in place, their step sizes learned."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from featherweight.core.context import Context
from featherweight.core.errors import TaskError
from featherweight.core.fit import Schedule, Term, task_loss, towards, weighted
from featherweight.core.soft import encodings, fold
from featherweight.core.step import Between, OneOf, Trait
from featherweight.model.graph import captured
from featherweight.model.norms import without_norms
from featherweight.model.select import LayerStep

from .learning import Learning
from .static import Bits, StaticQuantization


class AwareQuantization(LayerStep, Schedule, kind="quantize.aware"):
    """Train the model with its weights and activations held on grids of integers whose step sizes are learned.

    It starts from `quantize.static` with least squared errors, and `rounding` as there. Weights get `bits` per output
    channel (or, `ternary`, -1, 0 and 1), the inputs of layers `activation_bits`; the first and the last layer `ends`,
    as is usual, and what is only added or pooled 8. `weight` is the share of the original model's outputs, softened by
    `temperature`, in the loss; the task's own loss gets the rest. `train` "all" trains everything, "steps" only step
    sizes, biases and norms. Step sizes learn at `step_rate` times `lr`.

    Batch norms are kept while the model trains and folded afterwards, which leaves the integers as they are. In the
    last part of the training, `freeze`, their statistics and the ranges of activations stay as they are; with 1 norms
    are folded first. `precision` "bfloat16" multiplies in 16 bits while training, 1.7 times as fast where the processor
    has instructions for it. The model becomes a captured graph: it can still be trained, not reshaped. Raises
    `NotFinite` if calibration or the loss meets NaN, `TaskError` without training data.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.TRAINABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    paper: ClassVar[str] = "arXiv:1902.08153"
    trains: ClassVar[bool] = True

    epochs: Annotated[float, Field(gt=0), Between(1, 20, log=True)] = 6.0
    bits: Annotated[Bits, OneOf(2, 3, 4, 8)] = 4
    activation_bits: Annotated[Bits, OneOf(4, 8)] = 4
    ends: Bits = 8
    ternary: bool = False
    rounding: Literal["nearest", "adaptive", "block"] = "nearest"
    train: Literal["all", "steps"] = "all"
    weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    step_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    freeze: Annotated[float, Field(ge=0, le=1)] = 0.2
    precision: Literal["float32", "bfloat16"] = "float32"

    def forms(self) -> frozenset[str]:
        return self._static().forms()

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        if not ctx.task.has("train"):
            raise TaskError(f"task {ctx.task.name} has no 'train' data, which {self.kind} needs")
        normed = _normed(model, ctx) if self.freeze < 1 else set()
        module = self._static().apply(model, ctx)
        if module is model:
            return model
        assert isinstance(module, fx.GraphModule)
        learning = Learning(module, ctx, normed, self.ternary)
        trained: nn.Module = module
        teacher = ctx.teacher
        if self.precision == "bfloat16":
            trained, teacher = (InBfloat16(each, ctx.device.type) for each in (module, teacher))
        loss = self._train(learning, trained, teacher, ctx)
        learning.settle()
        for layer in {name.rpartition(".")[0] for name in learning.plan.layers}:
            ctx.change(layer, f"{ctx.record.changed[layer]}; {self._told(layer, learning)}")
        ctx.change("training", f"{self.epochs:g} epochs, {self.train} learned, last loss {loss:.4g}")
        return module

    def _static(self) -> StaticQuantization:
        """The step that the training starts from."""
        return StaticQuantization(
            only=self.only,
            skip=self.skip,
            bits=2 if self.ternary else self.bits,
            activation_bits=self.activation_bits,
            ends=self.ends,
            calibration="mse",
            weights="mse",
            rounding=self.rounding,
        )

    def _train(self, learning: Learning, trained: nn.Module, teacher: nn.Module, ctx: Context) -> float:
        soft = towards(self.temperature, [teacher])
        term: Term = weighted([(self.weight, soft), (1 - self.weight, task_loss)])
        with learning.only_steps(self.train == "steps"):
            return ctx.fit(
                trained,
                self,
                term,
                during=lambda _model, t: learning.during(t >= 1 - self.freeze),
                text="training in integers",
                groups=learning.groups(self.lr, self.step_rate),
            )

    def _told(self, layer: str, learning: Learning) -> str:
        places = [name.rpartition(".")[0] for name in learning.plan.layers]
        end = {places[-1]: "the last layer", places[0]: "the first layer"}.get(layer)
        kept = f" (ends={self.ends}: {end})" if end and not self.bits == self.activation_bits == self.ends else ""
        return f"step sizes learned{kept}"


class InBfloat16(nn.Module):
    """Compute a module's matrix products and convolutions in bfloat16; floats come out as float32."""

    def __init__(self, module: nn.Module, device: str):
        super().__init__()
        self.module, self.device = module, device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device, torch.bfloat16):
            output = self.module(*args, **kwargs)
        return tree_map(_as_float32, output)


def _as_float32(item: Any) -> Any:
    return item.float() if isinstance(item, Tensor) and item.is_floating_point() else item


def _normed(model: nn.Module, ctx: Context) -> set[str]:
    """The layers that quantization folds a batch norm into."""
    free = {name: ctx.task.free(name) for name in ctx.example}
    module = captured(fold(model), ctx.example, free)
    return set(without_norms(module, ctx.example, frozenset(encodings(model)))[1])
