"""All that a step may ask of the outside."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .blocks import Block, real_positions, walk
from .data import to_device
from .errors import NoEffect, NotFinite, TaskError
from .files import tensor_digest
from .fit import After, During, Groups, Schedule, Term, fit
from .outputs import first
from .progress import Progress
from .recipe import Recipe
from .record import LeftAlone as LeftAlone
from .record import StepRecord as StepRecord
from .soft import chains
from .step import Step
from .task import Split, Task
from .whole import observed_whole


class Stopwatch(Protocol):
    """Gives, for models, the seconds that each takes on the target called `name`."""

    @property
    def name(self) -> str: ...

    def __call__(self, models: Sequence[nn.Module]) -> list[float]: ...


@dataclass
class Context:
    """The task, the teacher, the device, randomness, training, progress: all that a step may ask of the outside.
    Nothing is global.

    `width_multiple` is what the target's kernels like the number of channels to be a multiple of; 1 if there is no
    target. `stopwatch` measures what models take on the target; None if there is no target.
    """

    task: Task
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    progress: Progress = field(default_factory=Progress)
    width_multiple: int = 1
    stopwatch: Stopwatch | None = None
    record: StepRecord = field(default_factory=lambda: StepRecord(step={}))

    @cached_property
    def teacher(self) -> nn.Module:
        """The user's own model, in evaluation mode, on the device (a copy if the user keeps it elsewhere)."""
        original = self.task.original
        places = {parameter.device.type for parameter in original.parameters()}
        return original if places <= {self.device.type} else copy.deepcopy(original).to(self.device)

    @property
    def example(self) -> dict[str, Tensor]:
        """Two real inputs by name, on the device."""
        return to_device(self.task.example, self.device)

    def generator(self, purpose: str) -> torch.Generator:
        """A random generator that depends on the seed and on what it is for, and on nothing else."""
        digest = hashlib.sha256(f"{self.seed}:{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def batches(self, split: Split) -> Iterator[Any]:
        """Batches of a split in order, on the device."""
        for batch in self.task.batches(split):
            yield to_device(batch, self.device)

    @torch.no_grad()
    def observe(
        self, model: nn.Module, hooks: dict[str, Callable[[tuple[Any, ...], Any], None]], split: Split = "calibrate"
    ) -> None:
        """Run `model` over a split; each hook gets the inputs and the output of its module, batch by batch.

        Parts that get only some of the inputs, such as experts, get all of them meanwhile: see `observed_whole`.
        """
        modules = dict(model.named_modules())
        handles = [
            modules[name].register_forward_hook(lambda _m, given, out, call=call: call(given, out))
            for name, call in hooks.items()
        ]
        was_training = model.training
        model.to(self.device).eval()
        try:
            for batch in self.progress.track(self.batches(split), f"observing {split}"):
                with observed_whole(model):
                    output = first(self.task.call(model, batch))
                if not torch.isfinite(output).all():
                    raise NotFinite(f"the model gives NaN or infinite outputs on the split {split!r}")
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()

    def blocks(self, model: nn.Module, split: Split = "calibrate") -> Iterator[Block]:
        """The repeated blocks of `model` in order, each with what the changed blocks before it give; see `walk`.

        The inputs of one block are held at a time, so memory grows with a block and its activations, not with the
        model. Gives nothing for a model without blocks that follow each other.
        """
        batches = list(self.batches(split))
        calls = [functools.partial(self.task.call, model, batch) for batch in batches]
        return walk(model.to(self.device).eval(), calls, [real_positions(batch) for batch in batches])

    def fit(
        self,
        model: nn.Module,
        training: Schedule,
        term: Term | None = None,
        during: During | None = None,
        text: str = "training",
        groups: Groups | None = None,
        after: After | None = None,
    ) -> float:
        """Train `model` in place; see `featherweight.core.fit.fit`."""
        return fit(model, self, training, term, during, text, groups, after)

    def seconds(self, models: Sequence[nn.Module]) -> list[float]:
        """Seconds of one run of each of these models on the target, exported and measured there side by side.

        Raises `TaskError` if there is no target to measure on.
        """
        if self.stopwatch is None:
            raise TaskError("of=latency is measured on the target, and there is none here; give one, or use of=macs")
        return self.stopwatch(models)

    def change(self, layer: str, how: str) -> None:
        """Record that the step changed `layer`, and how."""
        self.record.changed[layer] = how

    def leave(self, layer: str, reason: str) -> None:
        """Record that the step left `layer` alone, and why."""
        self.record.left.append(LeftAlone(layer=layer, reason=reason))

    def warn(self, text: str) -> None:
        """Record something that the user should know; it is shown in the report."""
        self.record.warnings.append(text)


def fingerprint(model: nn.Module) -> str:
    """Digest of everything that a model computes with: module types, attributes that hold sizes, tensors by name."""
    kinds = {name: type(module).__name__ + ":" + module.extra_repr() for name, module in model.named_modules()}
    return hashlib.sha256((str(sorted(kinds.items())) + tensor_digest(dict(model.state_dict()))).encode()).hexdigest()


def run_step(item: Step, model: nn.Module, ctx: Context, finite: bool = True) -> tuple[nn.Module, StepRecord]:
    """Apply one step to `model` (which it may consume); check that it did something and that all is still finite.

    Raises `NoEffect` if the model is as before, `NotFinite` if a weight or an output is not finite any more (not with
    `finite` False: a diagnosis wants to see where that starts).
    """
    ctx.record = StepRecord(step=item.full(), parameters_before=count_parameters(model))
    before, started = fingerprint(model), time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ctx.generator(item.kind).initial_seed())
        model = item.apply(model.to(ctx.device), ctx).eval()
    ctx.record.seconds = time.perf_counter() - started
    ctx.record.parameters_after = count_parameters(model)
    first = {left.reason: left.layer for left in sorted(ctx.record.left, key=lambda left: left.layer, reverse=True)}
    reasons = "; ".join(sorted(f"{layer}: {reason}" for reason, layer in first.items())[:3])
    if fingerprint(model) == before:
        raise NoEffect(
            f"{item.kind} changed nothing{': ' + reasons if reasons else ''}; remove it or change its settings"
        )
    if finite:
        check_finite(model, ctx, item.kind)
    return model, ctx.record


@torch.no_grad()
def check_finite(model: nn.Module, ctx: Context, kind: str) -> None:
    """Raise `NotFinite` if a weight of `model`, or an output on the example, is NaN or infinite after a step."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NotFinite(f"after {kind} the tensor {name!r} holds NaN or infinite values")
    if not torch.isfinite(first(model(**ctx.example))).all():
        raise NotFinite(f"after {kind} the model gives NaN or infinite outputs")


def run_recipe(recipe: Recipe, ctx: Context) -> tuple[nn.Module, list[StepRecord]]:
    """Apply every step of `recipe` in order to a copy of the task's model."""
    model, records = ctx.task.fresh(), []
    for place, item in enumerate(recipe.steps, 1):
        ctx.progress.say(f"step {place} of {len(recipe.steps)}: {item.kind}")
        model, record = run_step(item, model, ctx)
        records.append(record)
    return model, records


def count_parameters(model: nn.Module) -> int:
    """Parameters of `model`, each counted once; masked ones count, and soft weights as they are after decoding."""
    soft, behind = {}, set()
    for _, module, attribute, links in chains(model):
        original = module.parametrizations[attribute].original  # type: ignore[union-attr,index]
        encoding = None if original.numel() else links[-1].encode(original)  # a held weight leaves nothing behind
        soft[id(original)] = math.prod(encoding.shape) if encoding is not None else original.numel()
        behind |= {id(each) for each in module.parametrizations[attribute].parameters()}  # type: ignore[union-attr,index]
    plain = {id(each): each.numel() for each in model.parameters() if id(each) not in behind}
    return sum(plain.values()) + sum(soft.values())
