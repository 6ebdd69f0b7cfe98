"""The weights of layers as matrices of rows and columns, and what stands for them put back into the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.context import Context
from ..core.encoding import Encoding, Sparse
from ..core.soft import encodings
from .held import Held
from .select import LayerStep

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Matrix:
    """The weight of one layer as [rows, columns]: `axis` (its outputs) first, the rest in one row.

    `lookup` says that it is a table whose rows are looked up, `transposed` that its columns are no inputs that could
    be observed. `twins` are the other layers that share the weight. Where `keep` [rows, columns] is False the weight is
    pruned.
    """

    name: str
    layer: nn.Module
    axis: int = 0
    lookup: bool = False
    transposed: bool = False
    keep: Tensor | None = None
    twins: tuple[nn.Module, ...] = ()

    @cached_property
    def columns(self) -> int:
        weight = self.parameter()
        return weight.numel() // weight.shape[self.axis]

    def parameter(self) -> Tensor:
        """The weight as it stands in the layer."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def weight(self) -> Tensor:
        """A copy of the weight as [rows, columns], float32."""
        return self.parameter().detach().movedim(self.axis, 0).flatten(1).float().clone()

    def group(self, wanted: int | None) -> int:
        return fitting_group(self.columns, wanted)

    def grouping(self, wanted: int | None) -> str:
        """How many weights share a scale, and why it is not `wanted`."""
        group = self.group(wanted)
        text = "one scale per row" if group == self.columns else f"groups of {group}"
        return text if wanted in (None, group) else f"{text} ({wanted} does not divide {self.columns})"

    def form(self) -> str:
        """What is stored now."""
        encoding = encodings(self.layer)["weight"]
        return f"{encoding.form}, {encoding.bits_per_weight():.2f} bits per weight"


def chosen_matrices(step: LayerStep, model: nn.Module, ctx: Context, rest: str = "stays in floats") -> list[Matrix]:
    """The matrices that a step is to change; every other layer that has parameters is reported as left alone (of which
    `rest` says what becomes).
    """
    embeddings = bool(getattr(step, "embeddings", False))
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED, *_conv1d(model))
    stored = encodings(model)
    found: list[Matrix] = []
    types = (*kinds, nn.Embedding) if embeddings else kinds
    for name, layer in step.layers(model, ctx, types):
        sharing = sharers(model, layer)
        reason = obstacle(name, layer, stored.get(f"{name}.weight"), sharing, types)
        if reason:
            ctx.leave(name, reason)
        elif not any(other.layer.weight is layer.weight for other in found):
            found.append(_matrix(name, layer, stored.get(f"{name}.weight"), tuple(other for _, other in sharing)))
            for twin, _ in sharing:
                ctx.change(twin, f"shares the weight of {name}")
    _leave_others(model, ctx, types, rest)
    return found


def _conv1d(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The linear layer with a transposed weight that transformers has for GPT-2, if the model holds one."""
    named = {type(module) for module in model.modules() if type(module).__name__ == "Conv1D" and hasattr(module, "nf")}
    return tuple(named)


def _matrix(name: str, layer: nn.Module, stored: Encoding | None, twins: tuple[nn.Module, ...]) -> Matrix:
    transposed = isinstance(layer, TRANSPOSED)
    axis = 1 if transposed or type(layer).__name__ == "Conv1D" else 0
    lookup = any(isinstance(each, nn.Embedding) for each in (layer, *twins))
    keep = None
    if isinstance(stored, Sparse):
        keep = stored.keep.movedim(axis, 0).flatten(1)
    return Matrix(name, layer, axis, lookup, transposed or isinstance(layer, nn.Conv3d), keep, twins)


def sharers(model: nn.Module, layer: nn.Module) -> list[tuple[str, nn.Module]]:
    """The other modules whose `weight` is the same tensor, by name."""
    if parametrize.is_parametrized(layer):
        return []
    weight = layer.weight
    return [
        (name, module)
        for name, module in model.named_modules()
        if module is not layer and not parametrize.is_parametrized(module) and getattr(module, "weight", None) is weight
    ]


def obstacle(
    name: str,
    layer: nn.Module,
    stored: Encoding | None,
    sharing: list[tuple[str, nn.Module]],
    types: tuple[type[nn.Module], ...],
) -> str:
    """Why the weight of a layer cannot be stored as integers in groups; empty if it can."""
    kind = parametrize.type_before_parametrizations(layer)
    if stored is not None and not isinstance(stored, Sparse):
        return f"its weight is already stored as {stored.form}"
    if kind not in types:
        return f"is a {kind.__name__}, which may compute otherwise than the layer it is made from"
    if parametrize.is_parametrized(layer) and list(layer.parametrizations) != ["weight"]:  # type: ignore[arg-type]
        return "other tensors than its weight are parametrized"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its rows are normalised in place (max_norm)"
    for other, module in sharing:
        if type(module) not in types:
            hint = "; embeddings: true stores both" if isinstance(module, nn.Embedding) else ""
            return f"shares its weight with {other}, which stays in floats{hint}"
    return ""


def _leave_others(model: nn.Module, ctx: Context, types: tuple[type[nn.Module], ...], rest: str) -> None:
    """Report every module with weights of its own that is of no chosen type."""
    for name, module in model.named_modules():
        own = parametrize.is_parametrized(module) or any(True for _ in module.parameters(recurse=False))
        if own and not isinstance(module, types) and "parametrizations" not in name.split("."):
            kind = parametrize.type_before_parametrizations(module).__name__
            ctx.leave(name or kind, f"is a {kind}; {rest}")


def fitting_group(columns: int, group: int | None) -> int:
    """The group that divides `columns`: the one asked for, else its nearest divisor by ratio; all columns for None.

    Where the nearest divisor is more than twice or less than half of `group`, all columns share one scale.
    """
    if group is None:
        return columns
    divisors = [size for size in range(1, columns + 1) if columns % size == 0]
    nearest = min(divisors, key=lambda size: abs(math.log(size / group)))
    return nearest if group / 2 <= nearest <= group * 2 else columns


@torch.no_grad()
def put(matrix: Matrix, link: Held) -> None:
    """Put a link that holds the weight by itself in place of a layer's weight (and of its twins')."""
    for layer in (matrix.layer, *matrix.twins):
        _plain(layer)
        # unsafe: the checks would make the floats three times
        parametrize.register_parametrization(
            layer, "weight", link if layer is matrix.layer else _sharing(link), unsafe=True
        )


def _sharing(link: Held) -> Held:
    """A link of its own around the same tensors, for another layer with the same weight."""
    made = type(link)(**link.settings())
    for name, tensor in [*link.named_parameters(), *link.named_buffers()]:
        delattr(made, name)
        if isinstance(tensor, nn.Parameter):
            made.register_parameter(name, tensor)
        else:
            made.register_buffer(name, tensor)
    return made


def _plain(layer: nn.Module) -> None:
    """Give a layer a weight of its own that is a plain parameter: no chain on it, no sharing with another layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    value = weight.detach()
    if parametrize.is_parametrized(layer):
        kind = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        layer.__class__ = kind
    layer.weight = nn.Parameter(value, requires_grad=True)
