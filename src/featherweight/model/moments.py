"""What rounding needs to know of a layer's inputs: their second moment, and how far the layer's output has drifted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.blocks import Block, Enough, observed, real_positions
from ..core.context import Context
from ..core.data import tensors_in
from ..core.outputs import first


@dataclass
class Moments:
    """Sums over the rows of a layer's inputs: `hessian` [parts, columns, columns] (one part per group of channels),
    `largeness` [parts, columns] (sum of magnitudes), `drift` [columns, outputs] (inputs times the drift that the
    layer should make up for; None if there is none).
    """

    hessian: Tensor | None = None
    largeness: Tensor | None = None
    drift: Tensor | None = None
    rows: int = 0

    def add(self, inputs: Tensor, drift: Tensor | None = None) -> None:
        """Count inputs [parts, rows, columns] and what their outputs [rows, outputs] have drifted."""
        inputs = inputs.float()
        product, size = inputs.transpose(1, 2) @ inputs, inputs.abs().sum(1)
        self.hessian = product if self.hessian is None else self.hessian.add_(product)
        self.largeness = size if self.largeness is None else self.largeness.add_(size)
        if drift is not None:
            product = inputs[0].t() @ drift.float()
            self.drift = product if self.drift is None else self.drift.add_(product)
        self.rows += inputs.shape[1]

    def mean(self) -> Tensor:
        """The second moment of a row, [parts, columns, columns]; all sums become means, in place."""
        assert self.hessian is not None
        for total in (self.hessian, self.largeness, self.drift):
            if total is not None:
                total.div_(max(1, self.rows))
        self.rows = 1
        return self.hessian


def rows_of(layer: nn.Module, given: Tensor, real: Tensor | None = None) -> Tensor:
    """The vectors that the rows of a layer's weight are multiplied with, [parts, rows, columns].

    A convolution's are the patches of its input, one part for each of its groups. `real` [batch, length] drops padding.
    """
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return patches(layer, given)
    if real is not None and given.dim() == 3 and given.shape[:2] == real.shape:
        return given[real][None]
    return given.reshape(1, -1, given.shape[-1])


def patches(layer: nn.Conv1d | nn.Conv2d, given: Tensor) -> Tensor:
    """The patches of a convolution's input, [groups, positions, input channels of the group * kernel]."""
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        padded = nn.functional.pad(
            given,
            layer._reversed_padding_repeated_twice,
            "constant" if layer.padding_mode == "zeros" else layer.padding_mode,
        )
        padding: tuple[int, ...] = (0,) * len(layer.kernel_size)
    else:
        padded, padding = given, tuple(layer.padding)
    settings = (layer.kernel_size, layer.dilation, padding, layer.stride)
    if isinstance(layer, nn.Conv1d):
        settings = ((1, *layer.kernel_size), (1, *layer.dilation), (0, *padding), (1, *layer.stride))
        padded = padded[:, :, None]
    kernel, dilation, pad, stride = settings
    found = nn.functional.unfold(padded, kernel, dilation, pad, stride)
    found = found.reshape(len(found), layer.groups, -1, found.shape[-1])
    return found.permute(1, 0, 3, 2).flatten(1, 2)


@dataclass
class Stage:
    """Layers of a block that get the same input, and for each where its drift is read: a module's input, or its own
    output (None). The block's output is the input of "".
    """

    layers: list[str]
    sums: dict[str, str | None] = field(default_factory=dict)


Seen = tuple[str, Tensor, Tensor]  # a module's name, its first input, its output


def trace(block: Block) -> tuple[list[Seen], Tensor]:
    """The innermost modules of a block in the order in which they run on its first call, and the block's output."""
    seen: list[Seen] = []

    def note(name: str) -> Callable[[tuple[Any, ...], Any], None]:
        def hook(given: tuple[Any, ...], output: Any) -> None:
            inputs, outputs = list(tensors_in(given)), list(tensors_in(output))
            if inputs and outputs:
                seen.append((name, inputs[0], outputs[0]))

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
    for place, (name, given, out) in enumerate(seen):
        if name not in layers or any(name in stage.layers for _, stage in found):
            continue
        where = residual(out, given, seen[:place], seen[place + 1 :], output)
        same = next((stage for inputs, stage in found if inputs is given), None)
        if same is None:
            found.append((given, same := Stage([])))
        same.layers.append(name)
        same.sums[name] = where
    return [stage for _, stage in found]


def residual(out: Tensor, given: Tensor, before: list[Seen], after: list[Seen], output: Tensor) -> str | None:
    """The name of the module whose input is the sum of `out` and a value from before; "" for the block's own output.

    None if there is no such sum: then the layer's own output is what can be compared.
    """
    earlier = [value for _, inputs, outputs in before for value in (inputs, outputs)] + [given]
    sums = [(name, inputs) for name, inputs, _ in after if inputs is not out] + [("", output)]
    for name, total in sums:
        if total.shape == out.shape and total is not out:
            rest = total - out
            bound = 1e-4 * float(total.abs().max())
            if any(value.shape == rest.shape and float((rest - value).abs().max()) < bound for value in earlier):
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
            layer = block.module.get_submodule(name)
            drift = rows_of(nn.Identity(), wanted[name] - sums[name], real)[0] if original is not None else None
            found[name].add(rows_of(layer, inputs[name], real), drift)
    return found


def _watch(
    block: Block, stage: Stage, place: int, module: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of a stage's layers on one call, and the tensors in which drift is read."""
    inputs: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    wanted = len(stage.layers)
    readers: dict[str, list[str]] = {}
    for name, where in stage.sums.items():
        if where:
            readers.setdefault(where, []).append(name)

    def hook(name: str) -> Callable[[tuple[Any, ...], Any], None]:
        def note(given: tuple[Any, ...], output: Any) -> None:
            value = next(tensors_in(given))
            if name in stage.layers and name not in inputs:
                inputs[name] = value
                if stage.sums[name] is None:
                    sums[name] = first(output)
            for reader in readers.get(name, []):
                sums.setdefault(reader, value)
            if len(inputs) == wanted and len(sums) == wanted:
                raise Enough

        return note

    output = block.observe({name: hook(name) for name in {*stage.layers, *readers}}, place, module)
    for name, where in stage.sums.items():
        if where == "":
            sums[name] = first(output)
    return inputs, sums


def corrected(weight: Tensor, moments: Moments, damping: float) -> Tensor:
    """The weight [outputs, columns] that makes up for the drift of what it enters: ridge regression on its inputs.

    The loss of rounding is then measured from where the original network was, not from where the changed inputs lead
    (asymmetric calibration: GPTAQ, arXiv:2504.02692; with the residual stream: QEP, arXiv:2504.09629).
    """
    assert moments.hessian is not None and moments.drift is not None
    system = moments.mean()[0].double()
    system.diagonal().add_(damping * system.diagonal().mean().clamp_min(1e-30))
    step = torch.linalg.solve(system, moments.drift.double())
    return weight + step.t().to(weight.dtype) if bool(torch.isfinite(step).all()) else weight


@torch.no_grad()
def observe(model: nn.Module, names: list[str], ctx: Context) -> dict[str, Moments]:
    """The moments of these layers over the calibration data, in one pass."""
    found = {name: Moments() for name in names}
    layers = {name: model.get_submodule(name) for name in names}
    for batch in ctx.progress.track(ctx.batches("calibrate"), "calibrating"):
        real = real_positions(batch)
        hooks = {
            name: (lambda given, _out, name=name, real=real: found[name].add(rows_of(layers[name], given[0], real)))
            for name in names
        }
        observed(_Call(model, ctx), (batch,), {}, {f"model.{name}": hook for name, hook in hooks.items()})
    return found


class _Call(nn.Module):
    """The model, called as the task calls it."""

    def __init__(self, model: nn.Module, ctx: Context):
        super().__init__()
        self.model, self.ctx = model, ctx

    def forward(self, batch: object) -> object:
        return self.ctx.task.call(self.model, batch)
