"""quantize.rotate: a network in another basis, which computes the same from weights without outliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from featherweight.core.context import Context
from featherweight.core.outputs import difference
from featherweight.core.step import Place, Trait
from featherweight.model.groups import tensors
from featherweight.model.rotations import Basis, Gain, Tie, free_bases
from featherweight.model.select import LayerStep, left_out

from .hadamard import peak, random_rotation, turned

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


class Rotation(LayerStep, kind="quantize.rotate"):
    """Rotate what passes between layers at random, by their weights alone: outliers are spread, outputs stay.

    A step before one that rounds; it stores nothing in fewer bits by itself. Wherever a vector is written and read by
    linear layers, with nothing in between that looks at single entries, the writers are multiplied by a random Hadamard
    matrix and the readers by its inverse: values and output projection of each attention head, queries and keys where
    no rotary embedding comes between, and the residual stream where the gains of its norms can move into the layers
    behind them. A layer norm stays one, as the rotation keeps the mean. All of it is found in the exported graph, and
    whatever changes the outputs on the example beyond rounding is undone and named. A gain cannot move into an output
    layer that is tied to an embedding; with `untie` that gets a weight of its own, which makes the model larger. A
    rotation is done only where all its layers are chosen. Raises `TaskError` if the model cannot be exported.
    """

    # A rotation of masked weights would fill their zeros again, so it comes before what ends RESHAPABLE.
    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    place: ClassVar[Place | None] = None  # by itself it gains nothing, and many networks have nothing to rotate
    gains: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = "arXiv:2404.00456"

    untie: bool = False

    @torch.no_grad()
    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        model.eval()
        chosen = [name for name, _ in self.layers(model, ctx, LAYERS)]
        keep = self._kept(model)
        want = model(**_cloned(ctx.example))
        free = free_bases(model, ctx.example, keep)
        copies = _untied(model, free.ties) if self.untie else {}
        if copies:
            free = free_bases(model, ctx.example, keep)
        rotations = {basis: self._rotation(basis, ctx) for basis in free.bases}
        held = tensors(model)

        def check(bases: Sequence[Basis]) -> str:
            values = rotated(held, {basis: rotations[basis] for basis in bases})
            return difference(want, functional_call(model, values, (), _cloned(ctx.example)))

        done, refused = agreeing(free.bases, check)
        values = rotated(held, {basis: rotations[basis] for basis in done})
        fixed = free.fixed | {place: reason for basis, reason in refused.items() for place in basis.places}
        _report(ctx, chosen, held, values, done, fixed)
        for name, value in values.items():
            held[name].data = value
        _tied_again(ctx, copies, values)
        return model

    def _kept(self, model: nn.Module) -> dict[str, str]:
        """The parameters of layers that are not chosen, and why."""
        found = {}
        for name, reason in left_out(model, LAYERS, self.only, self.skip):
            for attribute, _ in model.get_submodule(name).named_parameters():
                found[f"{name}.{attribute}"] = f"{name} is {reason}"
        return found

    def _rotation(self, basis: Basis, ctx: Context) -> Tensor:
        name, dim = basis.places[0]
        return random_rotation(basis.block, ctx.generator(f"{self.kind}:{name}:{dim}"), basis.ones)


def _cloned(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in example.items()}


def rotated(held: Mapping[str, Tensor], rotations: Mapping[Basis, Tensor]) -> dict[str, Tensor]:
    """The tensors of `held` that change, by name, when these bases are rotated and the gains in their way moved."""
    values: dict[str, Tensor] = {}
    for gain in dict.fromkeys(gain for basis in rotations for gain in basis.gains):
        values |= moved({**held, **values}, gain)
    for basis, rotation in rotations.items():
        for name, dim in basis.places:
            values[name] = turned(values.get(name, held[name]).detach(), dim, rotation)
    return values


def moved(held: Mapping[str, Tensor], gain: Gain) -> dict[str, Tensor]:
    """The tensors that change when a norm's gain, and its shift if all have biases, move into the layers behind it.

    A shift that finds no bias stays behind, divided by the gain: the readers multiply it again.
    """
    factor = held[gain.weight].detach().double().flatten()
    found = {gain.weight: torch.ones_like(held[gain.weight])}
    shift = None if gain.bias is None else held[gain.bias].detach().double()
    for reader in gain.readers:
        weight = found.get(reader.weight, held[reader.weight]).detach()
        columns = weight.double().movedim(reader.dim, -1)
        if shift is not None and gain.into_biases and reader.bias is not None:
            bias = held[reader.bias].detach()
            found[reader.bias] = (bias.double() + columns @ shift).to(bias.dtype)
        found[reader.weight] = (columns * factor).movedim(-1, reader.dim).to(weight.dtype).contiguous()
    if gain.bias is not None and shift is not None:
        left = torch.zeros_like(shift) if gain.into_biases else shift / factor
        found[gain.bias] = left.to(held[gain.bias].dtype)
    return found


def agreeing(bases: Sequence[Basis], check: Callable[[Sequence[Basis]], str]) -> tuple[list[Basis], dict[Basis, str]]:
    """The bases that `check` finds nothing against when all are rotated together, and for each other one the reason.

    They are left out by halving.
    """

    def add(sure: list[Basis], more: Sequence[Basis]) -> tuple[list[Basis], dict[Basis, str]]:
        reason = check([*sure, *more]) if more else ""
        if not reason:
            return [*sure, *more], {}
        if len(more) == 1:
            return sure, {more[0]: f"undone: rotated, {reason}"}
        failed: dict[Basis, str] = {}
        for half in (more[: len(more) // 2], more[len(more) // 2 :]):
            sure, reasons = add(sure, half)
            failed |= reasons
        return sure, failed

    return add([], bases)


# -- tied weights ------------------------------------------------------------------------------------------------------
Copies = dict[str, tuple[nn.Module, str, nn.Parameter]]  # full name -> module, attribute, the weight it shared


def _untied(model: nn.Module, ties: Sequence[Tie]) -> Copies:
    """Give each module that reads a tied weight a copy of its own."""
    held, found = tensors(model), Copies()
    for tie in ties:
        module, shared = model.get_submodule(tie.module), held[tie.weight]
        for attribute, parameter in list(module._parameters.items()):
            if parameter is shared and isinstance(shared, nn.Parameter):
                copy = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
                setattr(module, attribute, copy)
                found[f"{tie.module}.{attribute}".lstrip(".")] = module, attribute, shared
    config: Any = getattr(model, "config", None)
    if found and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # or transformers would tie them again when it loads the model
    return found


def _tied_again(ctx: Context, copies: Copies, values: Mapping[str, Tensor]) -> None:
    """Tie what was copied in vain; say what the other copies cost."""
    for name, (module, attribute, shared) in copies.items():
        if name in values:
            size = shared.numel() * shared.element_size()
            ctx.warn(f"{name} is a weight of its own now: the model is {size:,} bytes larger before it is rounded")
        else:
            setattr(module, attribute, shared)


# -- what is told ------------------------------------------------------------------------------------------------------
def _report(
    ctx: Context,
    chosen: Sequence[str],
    held: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    done: Sequence[Basis],
    fixed: Mapping[tuple[str, int], str],
) -> None:
    turns = {place: basis.block for basis in done for place in basis.places}
    for name, value in values.items():
        owner, _, _ = name.rpartition(".")
        if value.dim() > 1 and owner not in ctx.record.changed:
            before, after = peak(held[name]), peak(value)
            text = f"{_sides(name, value, turns, fixed)}; largest weight {before:.1f}, now {after:.1f} times their RMS"
            ctx.change(owner or name, text)
    for layer in chosen:
        if layer not in ctx.record.changed:
            weight = next((name for name in held if held[name] is held.get(f"{layer}.weight")), "")
            reasons = {reason: None for (name, _), reason in fixed.items() if name == weight}
            ctx.leave(layer, "; ".join(reasons) or "it has no weight in the graph")


def _sides(name: str, value: Tensor, turns: Mapping[tuple[str, int], int], fixed: Mapping[tuple[str, int], str]) -> str:
    parts = []
    for dim, size in enumerate(value.shape):
        if (block := turns.get((name, dim))) is not None:
            parts.append(f"dimension {dim} turned" + ("" if block == size else f" in blocks of {block}"))
        elif size > 1:
            parts.append(f"dimension {dim} not: {fixed[name, dim]}")
    return "; ".join(parts)
