"""share.layers: layers of a row that are alike have one set of weights between them, of which one copy is stored."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featherweight.core.context import Context
from featherweight.core.fit import Training
from featherweight.core.step import Between, Place, Trait
from featherweight.model.select import LayerStep, excluded, unused

from .layouts import cycle, sequence, similar

ROWS = (nn.Sequential, nn.ModuleList)
Signature = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Row:
    """Children of one container whose parameters have the same names, shapes and types: their full names, in order."""

    layers: dict[str, nn.Module]

    def __len__(self) -> int:
        return len(self.layers)

    def holders(self) -> list[str]:
        """The full names of the modules in it that hold parameters themselves."""
        return [inner for name, layer in self.layers.items() for inner in _holders(name, layer)]

    def vectors(self) -> list[Tensor]:
        """All parameters of each layer, as one vector."""
        return [
            torch.cat([parameter.detach().flatten().float() for parameter in layer.parameters()])
            for layer in self.layers.values()
        ]


class LayerSharing(LayerStep, kind="share.layers"):
    """Let the layers of a row that are alike share their weights, so that a share `keep` of different ones is left.

    A row is an `nn.Sequential` or `nn.ModuleList`; alike are children whose parameters have the same names, shapes and
    types. At least one set of weights is left of each row. `layout` says which share: neighbours ("sequence", 0 0 1 1),
    in turn ("cycle", 0 1 0 1), or those whose weights lie nearest to one another ("similar"). With `share` "matrices"
    each layer keeps biases and norms of its own. The shared weights start as the mean of the set, or as its first
    layer's (`start`). The layers stay modules of their own that hold one tensor, which is saved and exported once. With
    `retrain` the network is then trained; it seldom works without. `only` and `skip` choose rows by the names of their
    containers, and rows within a layer that shares are left alone.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    takes: ClassVar[Trait] = Trait.RESHAPABLE
    place: ClassVar[Place | None] = None  # on request: without much training it costs most networks too much
    gains: ClassVar[frozenset[str]] = frozenset({"size"})
    paper: ClassVar[str] = "arXiv:1909.11942, arXiv:2104.06022"

    keep: Annotated[float, Field(gt=0, lt=1), Between(0.1, 0.7)] = 0.5
    layout: Literal["sequence", "cycle", "similar"] = "sequence"
    share: Literal["all", "matrices"] = "all"
    start: Literal["mean", "first"] = "mean"
    retrain: Training | None = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        for glob in unused(model, ROWS, self.only, self.skip):
            ctx.warn(f"{self.kind}: no row of layers matches {glob!r}")
        before = sum(parameter.numel() for parameter in model.parameters())
        for row in self._rows(model, ctx):
            self._share(row, ctx)
        _leave_others(model, ctx)
        if ctx.record.changed and self.retrain is not None:
            loss = ctx.fit(model, self.retrain, text="training shared layers")
            after = sum(parameter.numel() for parameter in model.parameters())
            ctx.change("*", f"{before} parameters became {after}, trained to a loss of {loss:.4g}")
        return model

    def _rows(self, model: nn.Module, ctx: Context) -> Iterator[Row]:
        """The rows in which something can be shared; what cannot is named."""
        holders = _holders_of(model)
        taken: list[str] = []
        for name, container in list(model.named_modules()):
            inside = next((each for each in taken if name.startswith(f"{each}.")), None)
            if not isinstance(container, ROWS) or inside is not None:
                continue
            for row in _alike(name, container):
                if reason := excluded(name, self.only, self.skip) or self._obstacle(row, holders):
                    for inner in row.holders():
                        ctx.leave(inner, reason)
                else:
                    taken += row.layers
                    yield row

    def _sets(self, row: Row) -> int:
        """How many sets of weights are left of a row."""
        return max(1, round(self.keep * len(row)))

    def _obstacle(self, row: Row, holders: dict[int, set[int]]) -> str:
        """Why a row cannot share; empty if it can."""
        layers = list(row.layers.values())
        if any(parametrize.is_parametrized(module) for layer in layers for module in layer.modules()):
            return "weights of its row are stored in another form already"
        inside = {id(module) for layer in layers for module in layer.modules()}
        if any(holders[id(parameter)] - inside for layer in layers for parameter in layer.parameters()):
            return "weights of its row are those of layers elsewhere"
        different = len({tuple(id(parameter) for parameter in layer.parameters()) for layer in layers})
        if different <= self._sets(row):
            return f"{different} different layers in its row that are alike; keep={self.keep} asks for no fewer"
        if self.share == "matrices" and all(parameter.dim() < 2 for parameter in layers[0].parameters()):
            return "its row holds no matrices"
        return ""

    @torch.no_grad()
    def _share(self, row: Row, ctx: Context) -> None:
        names, layout = list(row.layers), self._layout(row)
        sets = [[name for name, place in zip(names, layout) if place == each] for each in sorted(set(layout))]
        made = [self._shared([row.layers[name] for name in members]) for members in sets]
        for members, (weights, moved) in zip(sets, made):
            for name in members:
                _put(row.layers[name], weights)
            for inner in (inner for name in members for inner in _holders(name, row.layers[name])):
                if len(members) > 1:
                    ctx.change(
                        inner, f"one of {len(members)} with the weights of {members[0]}, {moved:.0%} of energy moved"
                    )
                else:
                    ctx.leave(inner, "no other layer of its row is in its set")

    def _layout(self, row: Row) -> list[int]:
        if self.layout == "similar":
            return similar(row.vectors(), self._sets(row))
        return (sequence if self.layout == "sequence" else cycle)(len(row), self._sets(row))

    def _shared(self, layers: list[nn.Module]) -> tuple[dict[str, nn.Parameter], float]:
        """The parameters that these layers are to share, and the share of the energy of all weights that this moves."""
        found: dict[str, nn.Parameter] = {}
        made: dict[int, nn.Parameter] = {}  # a layer may hold one parameter under several names
        moved = total = 0.0
        for name, first in layers[0].named_parameters(remove_duplicate=False):
            if self.share == "matrices" and first.dim() < 2:
                continue
            if id(first) in made:
                found[name] = made[id(first)]
                continue
            own = torch.stack([layer.get_parameter(name).detach().double() for layer in layers])
            value = own.mean(0) if self.start == "mean" else own[0]
            moved, total = moved + float((own - value).square().sum()), total + float(own.square().sum())
            found[name] = made[id(first)] = nn.Parameter(value.to(first.dtype), requires_grad=first.requires_grad)
        return found, moved / total if total else 0.0


def _put(layer: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    """Give a layer these parameters: the tensors are shared, not the modules, which may know their place."""
    for name, parameter in weights.items():
        prefix, _, attribute = name.rpartition(".")
        setattr(layer.get_submodule(prefix), attribute, parameter)


def _alike(name: str, container: nn.Module) -> Iterator[Row]:
    """The rows of a container: its children with parameters, those of one signature together."""
    found: dict[tuple[type[nn.Module], Signature], dict[str, nn.Module]] = {}
    for child, layer in container.named_children():
        signature = tuple((each, tuple(p.shape), p.dtype) for each, p in layer.named_parameters())
        if signature:
            kind = parametrize.type_before_parametrizations(layer)
            found.setdefault((kind, signature), {})[f"{name}.{child}" if name else child] = layer
    return (Row(layers) for layers in found.values())


def _holders_of(model: nn.Module) -> dict[int, set[int]]:
    """The identities of the modules that hold each parameter, by its identity."""
    found: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), set()).add(id(module))
    return found


def _holders(name: str, layer: nn.Module) -> list[str]:
    """The full names of the modules in a layer that hold parameters themselves, as they are or in another form."""
    found: dict[str, None] = {}
    for each, module in layer.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            owner = f".{each}".partition(".parametrizations.")[0].lstrip(".")
            found[f"{name}.{owner}".strip(".")] = None
    return list(found)


def _leave_others(model: nn.Module, ctx: Context) -> None:
    """Report every module with parameters of its own that nothing was said of."""
    said = {*ctx.record.changed, *(each.layer for each in ctx.record.left)}
    for name in _holders("", model):
        if name not in said:
            ctx.leave(name or type(model).__name__, "no other layer of a row is like it")
