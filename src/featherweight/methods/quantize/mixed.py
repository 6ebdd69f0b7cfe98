"""quantize.mixed: every layer gets the number of bits that it needs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn

from featherweight.core.context import Context
from featherweight.core.data import to_device
from featherweight.core.errors import RecipeError
from featherweight.core.evaluate import records, torch_run
from featherweight.core.knapsack import STEPS, choose
from featherweight.core.outputs import first
from featherweight.core.record import LeftAlone, StepRecord
from featherweight.core.soft import copied, encodings
from featherweight.core.step import Trait, one_line
from featherweight.core.task import Split
from featherweight.model.parts import Replay, layer_outputs, parts, weights_before
from featherweight.model.select import LayerStep

from .static import StaticQuantization
from .weights import WeightQuantization

Width = Annotated[int, Field(ge=1, le=8)]
FLOAT_BITS = 32
TRIES = 7  # models that the bisection over budgets measures
Option = int | None  # bits, or None: the layer is left in floats
Table = dict[str, dict[Option, float]]


@dataclass
class Measured:
    """What each option of each layer loses and costs, what counts in the limit for each layer (its weights, or its
    multiply-accumulates), and for each number of bits the layers that cannot have it.
    """

    losses: Table = field(default_factory=lambda: defaultdict(dict))
    costs: Table = field(default_factory=lambda: defaultdict(dict))
    sizes: dict[str, float] = field(default_factory=dict)
    left: dict[int, list[LeftAlone]] = field(default_factory=dict)

    def columns(self, options: list[Option]) -> tuple[list[list[float]], list[list[float]]]:
        """Costs and losses, [layers][options]; what a layer cannot have costs infinity."""
        costs, losses = (
            [[each.get(option, math.inf) for option in options] for each in table.values()]
            for table in (self.costs, self.losses)
        )
        return costs, losses

    def report(self, ctx: Context) -> None:
        """Tell which layers cannot be quantized, and which not to every number of bits."""
        reasons: dict[str, dict[int, str]] = defaultdict(dict)
        for bits, items in self.left.items():
            for item in items:
                reasons[item.layer][bits] = item.reason
        for layer, each in reasons.items():
            if layer not in self.losses:
                ctx.leave(layer, "; ".join(dict.fromkeys(each.values())))
            else:
                for bits, reason in each.items():
                    ctx.leave(f"{layer} ({_words([bits])})", reason)


class MixedPrecision(LayerStep, kind="quantize.mixed"):
    """Give each layer the bits (one of `bits`, or floats if `leave`) that lose least within one budget for all.

    What a layer loses with a number of bits is measured on the first `inputs` of the calibration split: the power of
    the noise that this layer alone makes in the model's first output, over the power of the signal. The sum over
    layers is minimised exactly (a multiple-choice knapsack). `budget` says what is limited to `limit`: "bits" are
    average bits per weight with scales and zero points counted; "float_macs" is the share of multiply-accumulates that
    stay in floats, which is what integer kernels cannot speed up (needs `activations` "int8"); "drop" is what the
    metric may lose on the validation split, measured, in its own unit: the smallest model within it is found by
    bisection. `activations` "float" stores weights by `quantize.weights` with `method`, `group` and `symmetric`,
    "int8" computes on integers by `quantize.static`. A layer that cannot have some number of bits chooses among the
    others. Raises `RecipeError` if no choice is within the limit.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"uint4"})
    paper: ClassVar[str] = "arXiv:1911.03852"

    bits: tuple[Width, ...] = (8, 4, 3, 2)
    leave: bool = True
    budget: Literal["bits", "drop", "float_macs"] = "bits"
    limit: Annotated[float, Field(ge=0)] = 5.0
    activations: Literal["float", "int8"] = "float"
    method: Literal["rtn", "hqq", "gptq", "awq"] = "gptq"
    group: Annotated[int | None, Field(ge=2)] = 32
    symmetric: bool = False
    inputs: Annotated[int, Field(ge=1)] = 256

    @model_validator(mode="after")
    def _fits(self) -> MixedPrecision:
        if not self.bits:
            raise ValueError("give at least one number of bits")
        if self.budget == "float_macs" and self.activations == "float":
            raise ValueError("with activations float every multiply-accumulate is one of floats; set activations: int8")
        for bits in self.bits:
            try:
                self._step(bits)
            except ValidationError as error:
                raise ValueError(f"with {_words([bits])} {one_line(error)}") from error
        return self

    def forms(self) -> frozenset[str]:
        steps = [self._step(bits) for bits in self.bits]
        return frozenset(form for item in steps for form in item.forms())

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        found = self._measure(model, ctx)
        chosen = self._choose(model, found, ctx) if found.losses else {}
        found.report(ctx)
        for layer, bits in chosen.items():
            if bits is None:
                ctx.leave(layer, "what it loses in any number of bits is worth more elsewhere")
        return self._build(model, chosen, ctx) if any(chosen.values()) else model

    def _choose(self, model: nn.Module, measured: Measured, ctx: Context) -> dict[str, Option]:
        """The bits of each layer."""
        layers = list(measured.losses)
        options: list[Option] = [*sorted(set(self.bits)), *([None] if self.leave else [])]
        costs, losses = measured.columns(options)
        dearest = sum(max(filter(math.isfinite, each)) for each in costs)
        dearest *= STEPS / max(1, STEPS - len(layers))  # each layer's cost is rounded up by a step at most
        largest = dearest if self.budget == "drop" else self.limit * sum(measured.sizes.values())
        found = choose(costs, losses, max(largest, 1e-9))

        def given(budget: float) -> dict[str, Option]:
            return {layer: options[place] for layer, place in zip(layers, found.options(budget))}

        if self.budget == "drop":
            return self._least(model, ctx, given, largest)
        try:
            return given(largest)
        except ValueError as error:
            raise RecipeError(
                f"{self.kind}: {self.budget} cannot come down to {self.limit:g} with {_words(options)}; raise the limit"
            ) from error

    # -- what each choice costs and loses --------------------------------------------------------------------------
    def _measure(self, model: nn.Module, ctx: Context) -> Measured:
        found = Measured()
        for bits in sorted(set(self.bits)):
            own = replace(ctx, record=StepRecord(step={}))
            changed = self._alone(bits).apply(copied(model), own)
            owned = {layer: each for layer, each in parts(changed).items() if layer in own.record.changed}
            found.left[bits] = own.record.left
            sizes, stored = stored_sizes(changed, owned)
            costs: Table = {layer: {bits: stored[layer], None: sizes[layer] * FLOAT_BITS} for layer in owned}
            found.sizes |= sizes
            if self.budget == "float_macs":
                macs = multiply_accumulates(changed, ctx.example, owned)
                costs = {layer: {bits: 0.0, None: macs[layer]} for layer in owned}
                found.sizes |= macs
            for layer, loss in self._losses(model, changed, owned, ctx).items():
                found.losses[layer] |= {bits: loss, None: 0.0}
                found.costs[layer] |= costs[layer]
        return found

    def _alone(self, bits: int) -> LayerStep:
        """What measures a layer alone: AWQ rounds to nearest, as its scales also change what makes a layer's inputs."""
        if self.activations == "float" and self.method == "awq":
            return self._step(bits, method="rtn")
        return self._step(bits).alone()

    @torch.no_grad()
    def _losses(
        self, model: nn.Module, changed: nn.Module, owned: dict[str, list[nn.Module]], ctx: Context
    ) -> dict[str, float]:
        """The power of the noise in the model's first output that each layer alone makes, over that of the signal."""
        replay, seen = Replay(changed.eval(), owned, weights_before(changed, model)), 0
        signal, noise = 0.0, dict.fromkeys(owned, 0.0)
        for batch in ctx.progress.track(ctx.batches("calibrate"), f"{self.kind}: what each layer loses"):
            want = first(replay.start(to_device(ctx.task.named_inputs(batch), ctx.device))).double()
            signal += float(want.square().sum())
            for layer in owned:
                noise[layer] += float((first(replay.run([layer])).double() - want).square().sum())
            seen += ctx.task.count(batch)
            if seen >= self.inputs:
                break
        return {layer: each / max(signal, 1e-300) for layer, each in noise.items()}

    # -- the model with the bits that were chosen ------------------------------------------------------------------
    def _step(self, bits: int, **settings: Any) -> LayerStep:
        """The method that quantizes the chosen layers to `bits`."""
        given: dict[str, Any] = {"bits": bits, "only": self.only, "skip": self.skip}
        if self.activations == "int8":
            return StaticQuantization(**given | {"ends": bits, "weights": "mse"} | settings)
        stored = {"group": self.group, "method": self.method, "symmetric": self.symmetric}
        return WeightQuantization(**given | stored | settings)

    def _build(self, model: nn.Module, chosen: dict[str, Option], ctx: Context) -> nn.Module:
        widths = {layer: bits for layer, bits in chosen.items() if bits is not None}
        own = replace(ctx, record=StepRecord(step={}))
        item = self._step(min(widths.values()), only=",".join(widths), skip=(), layer_bits=widths)
        made = item.apply(copied(model), own)
        for layer, how in own.record.changed.items():
            ctx.change(layer, how)
        ctx.record.warnings += own.record.warnings
        return made

    def _least(
        self, model: nn.Module, ctx: Context, given: Callable[[float], dict[str, Option]], largest: float
    ) -> dict[str, Option]:
        """The cheapest choice whose measured drop is within the limit: bisection over budgets up to `largest`.

        Raises `RecipeError` if even the dearest choice is not within it (it is floats everywhere, if `leave`).
        """
        split: Split = "validate" if ctx.task.has("validate") else "calibrate"
        metric = ctx.task.metric

        def figure(candidate: nn.Module) -> float:
            return metric.reduce(records(ctx.task, torch_run(ctx.task, candidate, ctx.device), split, ctx.progress))

        def drop(choice: dict[str, Option]) -> float:
            if not any(choice.values()):
                return 0.0  # floats everywhere
            made = self._build(model, choice, replace(ctx, record=StepRecord(step={})))
            return metric.drop(original, figure(made))

        original, best = figure(model), given(largest)
        if not (least := drop(best)) <= self.limit:
            raise RecipeError(
                f"{self.kind}: the metric drops by {least:.3g} even with {_words([max(self.bits)])}; raise limit "
                f"({self.limit:g}), or set leave: true"
            )
        low, high = 0.0, largest
        for _ in range(TRIES):
            middle = (low + high) / 2
            try:
                tried = given(middle)
            except ValueError:  # fewer bits than there are
                low = middle
                continue
            if drop(tried) <= self.limit:
                best, high = tried, middle
            else:
                low = middle
        return best


def _words(options: list[Option]) -> str:
    return ", ".join("floats" if option is None else f"{option} bit{'s' * (option > 1)}" for option in options)


def stored_sizes(model: nn.Module, layers: Iterable[str]) -> tuple[dict[str, int], dict[str, float]]:
    """The number of stored weights of each layer, and the bits that they take, scales and zero points counted."""
    sizes, bits = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0.0)
    for name, each in encodings(model).items():
        if (layer := name.rpartition(".")[0]) in sizes:
            sizes[layer] += math.prod(each.shape)
            bits[layer] += each.bits_per_weight() * math.prod(each.shape)
    return sizes, bits


@torch.no_grad()
def multiply_accumulates(model: nn.Module, example: dict[str, torch.Tensor], layers: Iterable[str]) -> dict[str, float]:
    """Multiply-accumulates of each layer for the example: entries of its output times weights per output channel (for
    a transposed convolution: entries of its output times weights per input channel, an upper bound).
    """
    outputs = layer_outputs(model, example, layers)
    shapes = {name.rpartition(".")[0]: each.shape for name, each in encodings(model).items()}
    return {
        layer: outputs[layer].numel() * math.prod(shapes[layer][1:]) if layer in outputs else 0.0 for layer in layers
    }
