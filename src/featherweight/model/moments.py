"""What rounding needs to know of a layer's inputs: their second moment, and how far the layer's output has drifted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.blocks import Block, Enough, observed, real_positions
from ..core.context import Context
from ..core.data import tensors_in
from ..core.errors import TaskError
from ..core.outputs import first
from ..core.task import Split

ROWS = 8192  # of one product: bounds the memory that the patches of a convolution take


@dataclass
class Moments:
    """Sums over the rows of a layer's inputs: `hessian` [parts, columns, columns] (one part per group of channels),
    `largeness` [parts, columns] (sum of magnitudes), `drift` [columns, outputs] (inputs times the drift that the
    layer should make up for; None if there is none, and `note` says why if there should be).
    """

    hessian: Tensor | None = None
    largeness: Tensor | None = None
    drift: Tensor | None = None
    rows: int = 0
    note: str = ""

    def add(self, pieces: Iterable[Tensor]) -> None:
        """Count inputs, in pieces of [parts, rows, columns]."""
        for piece in pieces:
            inputs = piece.float()
            if self.hessian is None or self.largeness is None:
                self.hessian = inputs.new_zeros(len(inputs), inputs.shape[2], inputs.shape[2])
                self.largeness = inputs.new_zeros(len(inputs), inputs.shape[2])
            self.hessian.baddbmm_(inputs.mT, inputs)
            self.largeness.add_(inputs.abs().sum(1))
            self.rows += inputs.shape[1]

    def add_drift(self, pieces: Iterable[Tensor], drift: Tensor) -> None:
        """Count what the outputs [rows, outputs] of these inputs have drifted."""
        done = 0
        for piece in pieces:
            inputs = piece[0].float()
            product = inputs.t() @ drift[done : done + len(inputs)].float()
            self.drift = product if self.drift is None else self.drift.add_(product)
            done += len(inputs)

    def mean(self) -> Tensor:
        """The second moment of a row, [parts, columns, columns]; all sums become means, in place."""
        assert self.hessian is not None
        for total in (self.hessian, self.largeness, self.drift):
            if total is not None:
                total.div_(max(1, self.rows))
        self.rows = 1
        return self.hessian


def rows_of(layer: nn.Module, given: Tensor, real: Tensor | None = None) -> Iterator[Tensor]:
    """The vectors that the rows of a layer's weight are multiplied with, in pieces: [parts, rows, columns] each.

    A convolution's are the patches of its input, one part for each of its groups. `real` [batch, length] drops padding.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        yield from without_padding(given, real).reshape(1, -1, given.shape[-1]).split(ROWS, 1)
        return
    batch = given if given.dim() == layer.weight.dim() else given[None]
    for part in batch.split(max(1, ROWS // batch[0, 0].numel())):
        yield patches(layer, part)


def patches(layer: nn.Conv1d | nn.Conv2d, given: Tensor) -> Tensor:
    """The patches of `given` (N x channels x ...) under the kernel of `layer`: [groups, N * places, columns]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(given, layer._reversed_padding_repeated_twice, mode)
    size, spread, step = layer.kernel_size, layer.dilation, layer.stride
    if isinstance(layer, nn.Conv1d):
        padded, size, spread, step = padded[:, :, None], (1, *size), (1, *spread), (1, *step)
    columns = nn.functional.unfold(padded, size, spread, stride=step)  # N x (channels * kernel) x places
    return columns.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def outputs_of(layer: nn.Module, made: Tensor, real: Tensor | None = None) -> Tensor:
    """What a layer makes of its rows, in their order: [rows, outputs]."""
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        batch = made if made.dim() == layer.weight.dim() else made[None]
        return batch.movedim(1, -1).flatten(0, -2)
    return without_padding(made, real).reshape(-1, made.shape[-1])


def without_padding(values: Tensor, real: Tensor | None) -> Tensor:
    """The rows of [batch, length, width], or of all positions in one row as experts get them, that are no padding."""
    if real is not None and values.dim() == 3 and values.shape[:2] == real.shape:
        return values[real]
    if real is not None and values.dim() == 2 and len(values) == real.numel():
        return values[real.flatten()]
    return values


@dataclass
class Stage:
    """Layers of a block that get the same input, and for each where its drift is read: a module's input, or its own
    output (None). The block's output is the input of "". Layers in `repeated` run more than once.
    """

    layers: list[str]
    sums: dict[str, str | None] = field(default_factory=dict)
    repeated: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Seen:
    """A module that ran: its first input and its output, and both as they were then (later ones may change them)."""

    name: str
    given: Tensor
    made: Tensor
    before: Tensor
    after: Tensor


def trace(block: Block) -> tuple[list[Seen], Tensor]:
    """The innermost modules of a block in the order in which they run on its first call, and the block's output."""
    seen: list[Seen] = []

    def note(name: str) -> Callable[[tuple[Any, ...], Any], None]:
        def hook(given: tuple[Any, ...], output: Any) -> None:
            inputs, outputs = list(tensors_in(given)), list(tensors_in(output))
            if inputs and outputs:
                seen.append(Seen(name, inputs[0], outputs[0], inputs[0].clone(), outputs[0].clone()))

        return hook

    inner = {
        name: note(name)
        for name, module in block.module.named_modules()
        if name
        and "parametrizations" not in name.split(".")
        and all(parametrize.is_parametrized(module) for _ in module.children())
    }
    return seen, first(block.observe(inner, 0))


def stages(block: Block, layers: list[str]) -> list[Stage]:
    """The chosen layers of a block in the order in which they run: those with the same input together.

    Layers that do not run on the first call are not in any stage.
    """
    seen, output = trace(block)
    found: list[tuple[Tensor, Stage]] = []
    for place, each in enumerate(seen):
        known = next((stage for _, stage in found if each.name in stage.layers), None)
        if known is not None:
            known.repeated.add(each.name)
        if each.name not in layers or known is not None:
            continue
        same = next((stage for inputs, stage in found if inputs is each.given), None)
        if same is None:
            found.append((each.given, same := Stage([])))
        same.layers.append(each.name)
        same.sums[each.name] = residual(seen, place, output)
    return [stage for _, stage in found]


def residual(seen: list[Seen], place: int, output: Tensor) -> str | None:
    """The name of the module whose input is the sum of what module number `place` made and a value from before; "" for
    the block's own output.

    None if there is no such sum: then the layer's own output is what can be compared.
    """
    made = seen[place].after
    earlier = [value for each in seen[:place] for value in (each.before, each.after)] + [seen[place].before]
    sums = [(each.name, each.before) for each in seen[place + 1 :]] + [("", output)]
    for name, total in sums:
        if total.shape == made.shape:
            rest = total - made
            bound = 1e-4 * float(total.abs().max())
            if float(rest.abs().max()) > bound and any(
                value.shape == rest.shape and float((rest - value).abs().max()) < bound for value in earlier
            ):
                return name
    return None


def gather(block: Block, original: nn.Module | None, stage: Stage) -> dict[str, Moments]:
    """The moments of a stage's layers over all calls of the block; with `original`, an untouched copy of the block,
    also the drift of each layer's output (or of the sum that it enters) from the original's.
    """
    found = {name: Moments() for name in stage.layers}
    for place, real in enumerate(block.real):
        inputs, sums = _watch(block, stage, place, None)
        wanted = _watch(block, stage, place, original)[1] if original is not None else {}
        for name in stage.layers:
            layer, each = block.module.get_submodule(name), found[name]
            for given in inputs.get(name, []):
                each.add(rows_of(layer, given, real))
            if original is None or name not in inputs:
                continue
            each.note = each.note or _no_drift(layer, stage, name, sums.get(name), wanted.get(name))
            if not each.note:
                drift = outputs_of(layer, wanted[name] - sums[name], real)
                each.add_drift(rows_of(layer, inputs[name][0], real), drift)
    for each in found.values():
        each.drift = None if each.note else each.drift
    return found


def _no_drift(layer: nn.Module, stage: Stage, name: str, now: Tensor | None, before: Tensor | None) -> str:
    """Why the drift of a layer cannot be measured; empty if it can."""
    if name in stage.repeated:
        return "it runs more than once"
    if getattr(layer, "groups", 1) > 1:
        return "its groups of channels are apart"
    if now is None or before is None or now.shape != before.shape:
        return "it meets other rows than in the original network"
    return ""


def _watch(
    block: Block, stage: Stage, place: int, module: nn.Module | None
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """The inputs of a stage's layers on one call (of each time that they run), and the tensors in which drift is read;
    layers that this call does not reach are in neither.
    """
    inputs: dict[str, list[Tensor]] = {}
    sums: dict[str, Tensor] = {}
    wanted = len(stage.layers)
    readers: dict[str, list[str]] = {}
    for name, where in stage.sums.items():
        if where:
            readers.setdefault(where, []).append(name)

    def hook(name: str) -> Callable[[tuple[Any, ...], Any], None]:
        def note(given: tuple[Any, ...], output: Any) -> None:
            value = next(tensors_in(given), None)
            if value is None:
                raise TaskError(_by_keyword(name))
            if name in stage.layers:
                inputs.setdefault(name, []).append(value.clone())
                if stage.sums[name] is None:
                    sums.setdefault(name, first(output).clone())
            for reader in readers.get(name, []):
                sums.setdefault(reader, value.clone())
            if len(inputs) == wanted and len(sums) == wanted and not stage.repeated:
                raise Enough

        return note

    output = block.observe({name: hook(name) for name in {*stage.layers, *readers}}, place, module)
    for name, where in stage.sums.items():
        if where == "":
            sums[name] = first(output)
    return inputs, sums


def _by_keyword(name: str) -> str:
    return f"the layer {name!r} is given its input by keyword, which cannot be observed; skip it"


def corrected(weight: Tensor, moments: Moments, damping: float) -> Tensor | None:
    """The weight [outputs, columns] that makes up for the drift of what it enters: ridge regression on its inputs.

    The loss of rounding is then measured from where the original network was, not from where the changed inputs lead
    (asymmetric calibration: GPTAQ, arXiv:2504.02692; with the residual stream: QEP, arXiv:2504.09629). None if the
    system has no finite solution.
    """
    assert moments.hessian is not None and moments.drift is not None
    system = moments.mean()[0].double()
    system.diagonal().add_(damping * system.diagonal().mean().clamp_min(1e-30))
    step = torch.linalg.solve(system, moments.drift.double())
    return weight + step.t().to(weight.dtype) if bool(torch.isfinite(step).all()) else None


@torch.no_grad()
def observe(model: nn.Module, names: list[str], ctx: Context) -> dict[str, Moments]:
    """The moments of these layers over the calibration data, in one pass; padding does not count."""
    found = {name: Moments() for name in names}
    layers = {name: model.get_submodule(name) for name in names}

    def hook(name: str, real: Tensor | None) -> Callable[[tuple[Any, ...], Any], None]:
        def note(given: tuple[Any, ...], _output: Any) -> None:
            if not given:
                raise TaskError(_by_keyword(name))
            found[name].add(rows_of(layers[name], given[0], real))

        return note

    watched(model, names, ctx, hook)
    return found


@torch.no_grad()
def sampled(model: nn.Module, names: list[str], ctx: Context, most: int) -> dict[str, Tensor]:
    """Up to `most` of the inputs [rows, columns] of each of these modules over the calibration data, float32, spread
    evenly over the batches; padding does not count.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    batches = max(1, sum(1 for _ in ctx.batches("calibrate")))

    def hook(name: str, real: Tensor | None) -> Callable[[tuple[Any, ...], Any], None]:
        def note(given: tuple[Any, ...], _output: Any) -> None:
            if not given:
                raise TaskError(_by_keyword(name))
            rows = without_padding(given[0], real).reshape(-1, given[0].shape[-1])
            found[name].append(rows[:: max(1, len(rows) * batches // most)].float().clone())

        return note

    watched(model, names, ctx, hook)
    return {name: torch.cat(rows)[:most] for name, rows in found.items() if rows}


def watched(
    model: nn.Module,
    names: Iterable[str],
    ctx: Context,
    hook: Callable[[str, Tensor | None], Callable[[tuple[Any, ...], Any], None]],
    split: Split = "calibrate",
) -> None:
    """Run `model` over a split with a hook on each of these modules: what `hook` gives for its name and for which
    positions of the batch are no padding ([batch, length], None where all are).
    """
    every, was_training = list(names), model.training
    model.eval()
    try:
        for batch in ctx.progress.track(ctx.batches(split), f"observing {split}"):
            hooks = {f"model.{name}": hook(name, real_positions(batch)) for name in every}
            observed(_Call(model, ctx), (batch,), {}, hooks)
    finally:
        model.train(was_training)


class _Call(nn.Module):
    """The model, called as the task calls it."""

    def __init__(self, model: nn.Module, ctx: Context):
        super().__init__()
        self.model, self.ctx = model, ctx

    def forward(self, batch: object) -> object:
        return self.ctx.task.call(self.model, batch)
