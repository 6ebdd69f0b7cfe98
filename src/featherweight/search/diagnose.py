"""Diagnosis: which layers a method costs most, and where a collapse starts."""

from __future__ import annotations

import math
import time as clock
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..core import registry
from ..core.context import Context, run_step
from ..core.data import to_device
from ..core.diagnosis import Collapse, Diagnosis, LayerPrice
from ..core.errors import NoEffect, RecipeError, TaskError
from ..core.metric import Records
from ..core.outputs import as_arrays, difference, first, named_outputs, rebuild
from ..core.progress import Progress
from ..core.recipe import Recipe
from ..core.record import LeftAlone
from ..core.soft import copied
from ..core.step import Step
from ..core.task import Split, Task
from ..model.parts import Parts, Replay, layer_outputs, only, parts, weights_before
from ..model.select import LayerStep

LIMIT = 512  # inputs of the split that are looked at
CONSTANT = 1e-6  # of the original's spread over inputs: an output that spreads less says nothing
CHANCE = 0.1  # of what the original has above chance: a metric that keeps less has collapsed
RESAMPLES = 300  # of the interval of each drop
Batch = object


@dataclass
class Outcome:
    """Records of the metric and power of signal and noise of one variant of the model, batch by batch."""

    records: list[np.ndarray] = field(default_factory=list)
    signal: float = 0.0
    noise: float = 0.0
    finite: bool = True

    @property
    def rows(self) -> Records:
        return np.concatenate(self.records)

    @property
    def decibels(self) -> float | None:
        """Signal to noise; None where there is no noise at all. Not finite outputs stand below everything."""
        if not self.finite:
            return -math.inf
        return 10 * math.log10(max(self.signal, 1e-300) / self.noise) if self.noise else None


class Variants:
    """A model before and after one step, and the same with the step's change in some layers only."""

    def __init__(self, ctx: Context, item: Step, model: nn.Module):
        self.ctx, self.item, self.model = ctx, item, model
        self.changed, self.record = run_step(item, copied(model), ctx, finite=False)
        self.instead = weights_before(self.changed, model)
        self.owned = self._switchable()
        self.layers = list(self.owned) if self.owned else list(self.record.changed)
        self.built: dict[tuple[str, ...], nn.Module] = {}
        self.together: dict[str, str] = {}

    def _switchable(self) -> Parts:
        """The parts of each changed layer, if the model with all of them off is the model before; else none."""
        found = {layer: owned for layer, owned in parts(self.changed).items() if layer in self.record.changed}
        if found:
            example = self.ctx.example
            with torch.no_grad(), only(found, (), self.changed, self.instead):
                if difference(self.model.to(self.ctx.device)(**example), self.changed(**example)):
                    return {}
        return found

    def build(self, layers: Sequence[str]) -> nn.Module | None:
        """The model with the step applied to `layers` alone; None, with the reason kept, if that changes nothing."""
        key = tuple(sorted(layers))
        if key not in self.built:
            item = self.item.model_copy(update={"only": ",".join(layers), "skip": ()})
            try:
                self.built[key] = run_step(item, copied(self.model), self.ctx, finite=False)[0]
            except NoEffect as error:
                own = [left.reason for left in self.ctx.record.left if [left.layer] == list(layers)]
                self.together[",".join(layers)] = own[0] if own else str(error)
                return None
        return self.built[key]

    def runner(self) -> Callable[[dict[str, torch.Tensor], Sequence[str] | None], object]:
        """A function of inputs and layers (None: no layer) that gives the output with these layers compressed."""
        if self.owned:
            replay = Replay(self.changed, self.owned, self.instead)
            return lambda inputs, layers: replay.start(inputs) if layers is None else replay.run(layers)
        return self._run_built

    @torch.no_grad()
    def _run_built(self, inputs: dict[str, torch.Tensor], layers: Sequence[str] | None) -> object:
        model = self.model if layers is None else self.changed if set(layers) == set(self.layers) else None
        model = model if model is not None else self.build(layers or ())
        assert model is not None
        return model.eval()(**inputs)


def diagnose(
    task: Task,
    recipe: Recipe,
    split: Split = "validate",
    limit: int = LIMIT,
    bar: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Measure what the last step of `recipe` costs in each layer alone, after the steps before it.

    One pass over the first `limit` inputs of `split`. Where the step only rounds or masks weights and activations its
    parts are switched on layer by layer in one compressed model; else the step is applied to each layer alone. Repairs
    that reach across layers (the correction of biases) are left out, and `method` in the result says so. Layers
    are ranked by the part of the drop that is certain (lower end of the paired 95% interval, above zero), then by
    signal to noise. The worst ones, as few as are needed for the drop to come down to `bar` (the metric's unit; None:
    for the interval of the drop to hold zero), make `skip`. Raises `RecipeError` for a step that has no layers.
    """
    started = clock.perf_counter()
    ctx = Context(task, seed=seed, progress=progress or Progress())
    *before, last = recipe.steps
    if not isinstance(last, LayerStep):
        raise RecipeError(f"{last.kind} does not work layer by layer; diagnose a method that has the setting `only`")
    model = task.fresh()
    for item in before:
        model, _ = run_step(item, model, ctx)
    found = _Examination(task, ctx, Variants(ctx, last.alone(), model), split, limit, bar).diagnosis()
    given = {"before": [item.dump() for item in before], "seconds": clock.perf_counter() - started}
    return found.model_copy(update=given)


Key = tuple[str, ...] | None  # the layers that are compressed; None: the model before


@dataclass
class _Examination:
    """The variants of a model over the first inputs of a split."""

    task: Task
    ctx: Context
    variants: Variants
    split: Split
    limit: int
    bar: float | None

    def diagnosis(self) -> Diagnosis:
        task, variants = self.task, self.variants
        outcomes = self.measure([(layer,) for layer in self.single()])
        base, whole = outcomes[None], outcomes[tuple(variants.layers)]
        prices = self.prices(base, outcomes)
        skip, skipped, enough = self.skip(prices, base, whole)
        metric = task.metric
        return Diagnosis(
            task=task.source or task.name,
            method=variants.item.dump(),
            split=self.split,
            n=len(base.rows),
            metric={"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better},
            bar=self.bar,
            original=metric.reduce(base.rows),
            compressed=metric.reduce(whole.rows) if whole.finite else None,
            drop=self.drop(base, whole)[0] if whole.finite else None,
            layers=prices,
            left=_left(variants),
            skip=skip,
            skipped_drop=skipped,
            enough=enough,
            collapse=self.collapse(base, whole),
        )

    def single(self) -> list[str]:
        """The layers that can be compressed alone."""
        variants = self.variants
        if variants.owned:
            return variants.layers
        track = self.ctx.progress.track(variants.layers, f"{variants.item.kind}, layer by layer")
        return [layer for layer in track if variants.build([layer]) is not None]

    def measure(self, sets: Iterable[tuple[str, ...]]) -> dict[Key, Outcome]:
        """The model before, the whole, and each of `sets`, in one pass over the inputs."""
        run, task = self.variants.runner(), self.task
        keys = list(dict.fromkeys([*sets, tuple(self.variants.layers)]))
        found: dict[Key, Outcome] = {key: Outcome() for key in (None, *keys)}
        text = f"{len(keys)} variants on {self.split}"
        for batch in self.ctx.progress.track(list(self.batches()), text):
            inputs = to_device(task.named_inputs(batch), self.ctx.device)
            reference = run(inputs, None)
            _add(found[None], task, batch, reference, reference)
            for key in keys:
                _add(found[key], task, batch, run(inputs, key), reference)
        return found

    def batches(self) -> Iterator[Batch]:
        """The first batches of the split, until they hold `limit` inputs."""
        seen = 0
        for batch in self.task.batches(self.split):
            yield batch
            seen += self.task.count(batch)
            if seen >= self.limit:
                return
        if not seen:
            raise TaskError(f"task {self.task.name}: the split {self.split!r} is empty")

    def drop(self, base: Outcome, other: Outcome) -> tuple[float, float, float]:
        """How much worse `other` is than `base`, with its paired 95% interval."""
        metric = self.task.metric
        value = metric.drop(metric.reduce(base.rows), metric.reduce(other.rows))
        return (value, *metric.drop_interval(base.rows, other.rows, resamples=RESAMPLES))

    def met(self, base: Outcome, other: Outcome) -> bool:
        """Whether what `other` loses is within the bar; without one, whether it may be chance."""
        if not other.finite:
            return False
        value, low, _ = self.drop(base, other)
        return low <= 0 if self.bar is None else value <= self.bar

    def prices(self, base: Outcome, outcomes: dict[Key, Outcome]) -> list[LayerPrice]:
        """The price of each layer alone, the worst first."""
        metric, found = self.task.metric, []
        for key, outcome in outcomes.items():
            if key is None or len(key) != 1:
                continue
            worst = metric.reduce(base.rows) if metric.higher_is_better else math.inf
            drop, low, high = self.drop(base, outcome) if outcome.finite else (worst,) * 3
            signal = outcome.decibels
            price = LayerPrice(
                layer=key[0],
                how=self.variants.record.changed.get(key[0], ""),
                drop=_number(drop),
                low=_number(low),
                high=_number(high),
                signal_db=None if signal is None else _number(signal),
            )
            found.append(price)
        return sorted(found, key=lambda price: (-max(price.low, 0.0), _loudness(price)))

    def skip(self, prices: list[LayerPrice], base: Outcome, whole: Outcome) -> tuple[list[str], float | None, bool]:
        """The fewest of the worst layers (none, one, two, four... up to half) without which the bar is met, what is
        then lost, and whether the bar is met.
        """
        if self.met(base, whole):
            return [], self.drop(base, whole)[0], True
        ranked, tried, count = [price.layer for price in prices], {}, 1
        while count <= max(1, len(ranked) // 2):
            left = tuple(layer for layer in self.variants.layers if layer not in ranked[:count])
            if not left or (not self.variants.owned and self.variants.build(left) is None):
                break
            tried[count] = self.measure([left])[left]
            if self.met(base, tried[count]):
                return ranked[:count], self.drop(base, tried[count])[0], True
            count *= 2
        drops = {count: self.drop(base, outcome)[0] for count, outcome in tried.items() if outcome.finite}
        best = min(drops, key=lambda count: drops[count], default=1)
        return ranked[:best], drops.get(best), False

    def collapse(self, base: Outcome, whole: Outcome) -> Collapse | None:
        """How the whole has collapsed, if it has, and the first layer in which that shows."""
        batch = next(self.batches())
        inputs = to_device(self.task.named_inputs(batch), self.ctx.device)
        run = self.variants.runner()
        want, got = (run(inputs, key) for key in (None, tuple(self.variants.layers)))
        if not whole.finite:
            how = "NaN or infinite outputs"
        elif _spread(first(got)) <= CONSTANT * _spread(first(want)):
            how = "the same output for every input"
        elif _at_chance(self.task, base, whole, batch, want):
            how = f"{self.task.metric.name} at chance"
        else:
            return None
        layer, sign = _start(self.variants, inputs)
        return Collapse(how=how, layer=layer, sign=sign)


def _add(outcome: Outcome, task: Task, batch: Batch, output: object, reference: object) -> None:
    got, want = (first(item).detach().double() for item in (output, reference))
    outcome.finite = outcome.finite and bool(torch.isfinite(got).all())
    if outcome.finite:
        outcome.records.append(np.asarray(task.metric.record(as_arrays(output), batch)))
        outcome.signal += float((want**2).sum())
        outcome.noise += float(((got - want) ** 2).sum())


def _loudness(price: LayerPrice) -> float:
    return math.inf if price.signal_db is None else price.signal_db


def _number(value: float) -> float:
    """A figure that JSON can hold."""
    return float(np.clip(value, -1e9, 1e9))


def _left(variants: Variants) -> list[LeftAlone]:
    """The layers that the step left alone, and those that it cannot compress alone."""
    together = [
        LeftAlone(layer=layer, reason=f"cannot be compressed alone: {reason}")
        for layer, reason in variants.together.items()
    ]
    return [*variants.record.left, *together]


# -- collapse ---------------------------------------------------------------------------------------------------------
def _spread(output: torch.Tensor) -> float:
    """Root mean square, over all entries, of the standard deviation from input to input."""
    values = output.detach().double()
    values = values.flatten(1) if values.dim() > 1 else values.reshape(-1, 1)
    return float(values.std(0, unbiased=False).square().mean().sqrt()) if len(values) > 1 else math.inf


def _at_chance(task: Task, base: Outcome, whole: Outcome, batch: Batch, output: object) -> bool:
    """Whether the metric keeps hardly more of the original's than outputs that belong to other inputs would give."""
    layout, named = named_outputs(output)
    count = task.count(batch)
    if count < 2 or any(tensor.dim() == 0 or len(tensor) != count for tensor in named.values()):
        return False  # outputs that cannot be told apart by input cannot be exchanged either
    strayed = {name: tensor.roll(count // 2, 0) for name, tensor in named.items()}
    stray = np.asarray(task.metric.record(rebuild(layout, as_arrays(strayed)), batch))
    chance, original = task.metric.reduce(stray), task.metric.reduce(base.rows)
    room = task.metric.drop(original, chance)
    return room > 0 and task.metric.drop(original, task.metric.reduce(whole.rows)) >= (1 - CHANCE) * room


def _start(variants: Variants, inputs: dict[str, torch.Tensor]) -> tuple[str, str]:
    """The first layer, in the order of computing, whose output is lost, and the sign of it; else the noisiest one."""
    if variants.owned:
        with only(variants.owned, (), variants.changed, variants.instead):
            wanted = layer_outputs(variants.changed, inputs, variants.layers)
        found = layer_outputs(variants.changed, inputs, variants.layers)
    else:
        names = dict(variants.changed.named_modules())
        layers = [layer for layer in variants.layers if layer in names]
        wanted = layer_outputs(variants.model, inputs, layers)
        found = layer_outputs(variants.changed, inputs, layers)
    worst, loudest = "", math.inf
    for layer, got in found.items():
        want = wanted[layer]
        if not torch.isfinite(got).all():
            return layer, "its output is NaN or infinite"
        if _spread(got) <= CONSTANT * _spread(want):
            return layer, "its output is the same for every input"
        if got.shape == want.shape:
            noise = float((got.double() - want.double()).square().mean())
            ratio = float(want.double().square().mean()) / noise if noise else math.inf
            if ratio < 1:
                return layer, "its output holds more noise than signal"
            worst, loudest = (layer, ratio) if ratio < loudest else (worst, loudest)
    return worst, f"its output is the noisiest, {10 * math.log10(loudest):.0f} dB" if worst else "in no single layer"


def parse_method(text: str) -> Recipe:
    """The recipe that `text` means: the name of a method, a YAML file, or the name of a recipe that ships with us."""
    registry.load("methods")
    if text in Step.kinds:
        return Recipe([{"kind": text}])
    try:
        return Recipe.read(text)
    except RecipeError as error:
        if Path(text).is_file():
            raise
        raise RecipeError(f"there is no method or recipe {text!r}; see: featherweight methods") from error
