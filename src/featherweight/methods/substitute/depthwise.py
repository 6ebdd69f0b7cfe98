"""substitute.separable: a depthwise and a pointwise convolution in place of one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...core.context import Context
from ...core.fit import Schedule
from ...core.soft import copied
from ...core.step import OneOf, Place
from ...model.blocks import input_shapes
from ...model.factored import Factored
from ...model.imitation import block_errors, enclosing, imitate
from ...model.matrices import Matrix
from ...model.moments import observe
from ...model.recalibrate import recalibrate
from ...model.replacing import Made, Replacing, exchanged, filled, pointwise
from .budget import Option, chosen, layer_macs
from .separable import energy, fitted, output_error, product

KINDS = (nn.Conv1d, nn.Conv2d)
UNKNOWNS = 6000  # of the largest system that is solved; above it the depthwise part stays as it began
TOGETHER = 2**25  # entries of the moments that are taken in one pass over the data


class SeparableConvolutions(Replacing, kind="substitute.separable"):
    """Put a depthwise and a pointwise convolution in place of each convolution with a kernel.

    Both are fitted to the layer's own inputs and outputs on the calibration data by alternating least squares, from the
    singular vectors of its weight. Each input channel has `multiplier` depthwise kernels; with `keep`, the share of the
    network's multiply-accumulates that is to be left, each layer gets the number of them up to `multiplier`, or stays
    as it is, so that the shares of energy that the layers miss add up to the least. `normalize` puts a batch norm
    between the two, which takes nothing from an exported file and makes training stable.

    What pays: with `of` "latency" a layer is replaced only if the model with it replaced alone saves `min_gain` of its
    time on the target (layers that look alike and get inputs of one shape are measured once), with "macs" if it saves
    that share of the multiply-accumulates. With `imitate` the blocks (see `model.imitation`) in which a layer was
    replaced are trained, each for itself, to give what they gave before. Blocks that then miss more than `max_error` of
    the energy of their outputs are put back as they were; without `imitate` so are such layers. With `retrain` the
    network is then trained as a whole, which it seldom goes without: a teacher (`retrain: {teacher: 0.5}`) helps.
    Raises `TaskError` if there is no target for "latency".
    """

    place: ClassVar[Place | None] = None  # on request: without much training it costs most networks too much
    paper: ClassVar[str] = "arXiv:1704.04861, arXiv:1808.05517, arXiv:2012.03096"

    multiplier: Annotated[int, Field(ge=1, le=8), OneOf(1, 2)] = 1
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    normalize: bool = False
    of: Literal["macs", "latency"] = "macs"
    min_gain: Annotated[float, Field(ge=0, lt=1)] = 0.005  # what is less is not told from noise
    max_error: Annotated[float, Field(gt=0)] = 1.0
    imitate: Schedule | None = None

    @property
    def training(self) -> bool:
        return self.imitate is not None or super().training

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        before = copied(model) if self.imitate is not None else None
        model = self.changed(model, ctx)
        if before is not None and ctx.record.changed:
            model = self._taught(model, before, ctx)
        return self.healed(model, ctx)

    def obstacle(self, matrix: Matrix) -> str:
        layer, fewest = matrix.layer, self.multiplier if self.keep is None else 1
        if not isinstance(layer, KINDS) or matrix.parameter()[0, 0].numel() < 2:
            return "is no one- or two-dimensional convolution with a kernel above one"
        if layer.groups > 1:
            return "has groups of channels already"
        if _parameters(matrix, fewest) >= matrix.parameter().numel():
            return f"computes no more than a depthwise and a pointwise one with multiplier={fewest}"
        return ""

    def made(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterator[tuple[str, Made]]:
        macs = layer_macs(model, found, ctx.example)
        paying = {name: found[name] for name in self._paying(found, model, ctx, macs)}
        options = {name: self._options(*each) for name, each in _observed(paying, model, ctx)}
        if self.keep is not None:
            options = chosen(options, macs, self.keep, ctx)
        for name, (option, *_) in options.items():
            if self.imitate is None and option.missed > self.max_error:
                ctx.leave(name, f"{option.missed:.1%} of the energy of its outputs would be missed")
                continue
            size = f"{option.parameters:,} of {found[name].parameter().numel():,} parameters"
            how = f"multiplier {option.multiplier}: {size}, {option.missed:.1%} of the energy of its outputs missed"
            yield name, Made(_layers(found[name].layer, option, self.normalize), how)

    def _options(self, matrix: Matrix, moment: Tensor) -> list[Option]:
        """What may stand for a layer: with one multiplier, or with each that computes less where `keep` chooses."""
        weight = matrix.weight().reshape(*matrix.parameter().shape[:2], -1)
        inputs, places = weight.shape[1:]
        found = []
        for many in range(1 if self.keep is not None else self.multiplier, self.multiplier + 1):
            if _parameters(matrix, many) < weight.numel():
                sweeps = 5 if inputs * many * places <= UNKNOWNS else 0
                depth, point = fitted(weight, moment, many, sweeps)
                missed = output_error(weight, product(depth, point), moment)
                found.append(Option(many, depth, point, missed, energy(depth, moment)))
        return found

    def _paying(self, found: dict[str, Matrix], model: nn.Module, ctx: Context, macs: dict[str, float]) -> list[str]:
        """The layers whose replacement makes the model cheaper by `min_gain`; the others are reported."""
        if not found:
            return []
        gain = self._saved_time(found, model, ctx) if self.of == "latency" else self._saved_work(found, macs)
        for name, each in gain.items():
            if each < self.min_gain:
                of = "time" if self.of == "latency" else "multiply-accumulates"
                now = f"the model takes {1 - each:.3f} of its {of} with this layer replaced"
                ctx.leave(name, f"{now}: {'no gain' if each <= 0 else f'a gain below {self.min_gain:g}'}")
        return [name for name, each in gain.items() if each >= self.min_gain]

    def _saved_work(self, found: dict[str, Matrix], macs: dict[str, float]) -> dict[str, float]:
        fewest, whole = self.multiplier if self.keep is None else 1, macs[""]
        left = {name: _parameters(each, fewest) / each.parameter().numel() for name, each in found.items()}
        return {name: macs[name] * (1 - share) / whole for name, share in left.items()}

    def _saved_time(self, found: dict[str, Matrix], model: nn.Module, ctx: Context) -> dict[str, float]:
        shapes = input_shapes(model, found, ctx.example)
        looks = {name: f"{each.layer!r} {shapes[name]}" for name, each in found.items()}
        firsts = {look: name for name, look in reversed(looks.items())}
        whole, *rest = ctx.seconds([model, *(self._with_one(model, found[name]) for name in firsts.values())])
        saved = {look: 1 - seconds / whole for look, seconds in zip(firsts, rest)}
        return {name: saved[look] for name, look in looks.items()}

    def _with_one(self, model: nn.Module, matrix: Matrix) -> nn.Module:
        """A copy of `model` with one layer replaced, its weights of no account."""
        shape, many = matrix.parameter().shape, self.multiplier if self.keep is None else 1
        depth, point = torch.zeros(shape[1], many, shape[2:].numel()), torch.zeros(shape[0], shape[1], many)
        made = _layers(matrix.layer, Option(many, depth, point, 0.0, depth), False)
        return exchanged(copy.deepcopy(model), matrix.name, made)

    def _taught(self, model: nn.Module, before: nn.Module, ctx: Context) -> nn.Module:
        """The model with its blocks trained, and those that miss too much put back."""
        assert self.imitate is not None
        blocks = enclosing(before, ctx.record.changed)
        names = list(dict.fromkeys(blocks.values()))
        imitate(model, before, names, ctx, self.imitate, f"teaching blocks after {self.kind}")
        if self.recalibrate:
            recalibrate(model, ctx)
        errors = block_errors(model, before, names, ctx)
        for layer, block in blocks.items():
            text = f"{block} misses {errors[block]:.1%} of the energy of its outputs"
            if errors[block] <= self.max_error:
                ctx.change(layer, f"{ctx.record.changed[layer]}; taught, {text}")
            else:
                del ctx.record.changed[layer]
                ctx.leave(layer, f"put back: {text} after it was taught (max_error={self.max_error:g})")
        for block in names:
            if errors[block] > self.max_error:
                model = exchanged(model, block, copied(before.get_submodule(block)))
        return model


def _observed(found: dict[str, Matrix], model: nn.Module, ctx: Context) -> Iterator[tuple[str, tuple[Matrix, Tensor]]]:
    """Each layer with the second moment of the patches that it sees; some layers are observed in one pass."""
    waiting = dict(found)
    while waiting:
        part: list[str] = []
        size = 0
        for name, each in waiting.items():
            size += each.columns**2
            if part and size > TOGETHER:
                break
            part.append(name)
        moments = observe(model, part, ctx)
        for name in part:
            yield name, (waiting.pop(name), moments.pop(name).mean()[0])


def _parameters(matrix: Matrix, multiplier: int) -> int:
    """Those of the two layers, without the bias."""
    outputs, inputs = matrix.parameter().shape[:2]
    return inputs * multiplier * (matrix.parameter()[0, 0].numel() + outputs)


def _layers(layer: nn.Module, option: Option, normalize: bool) -> Factored:
    """The two layers with the weights of `option`, with a batch norm between them if `normalize`."""
    assert isinstance(layer, KINDS)
    depth, point = option.depthwise, option.pointwise
    inputs, multiplier = depth.shape[:2]
    kind: Any = type(layer)
    where = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    first = kind(inputs, inputs * multiplier, *where, groups=inputs, bias=False, padding_mode=layer.padding_mode)
    last = pointwise(layer, inputs * multiplier, len(point), layer.bias is not None)
    dtype = layer.weight.dtype
    if not normalize:
        return Factored(filled(first, depth.to(dtype)), filled(last, point.to(dtype), layer.bias))
    norm, scale = _norm(layer, option)
    return Factored(filled(first, depth.to(dtype)), norm, filled(last, (point * scale[None]).to(dtype), layer.bias))


def _norm(layer: nn.Module, option: Option) -> tuple[nn.Module, Tensor]:
    """A batch norm that only divides what the depthwise kernels give by its root mean square, which is given as well,
    [inputs, multiplier]: the running mean is zero and its bias too, so that nothing changes.
    """
    kind = nn.BatchNorm1d if isinstance(layer, nn.Conv1d) else nn.BatchNorm2d
    norm = kind(option.energy.numel())
    assert norm.running_var is not None
    norm.running_var.copy_(option.energy.reshape(-1))
    return norm, (option.energy + norm.eps).sqrt()
