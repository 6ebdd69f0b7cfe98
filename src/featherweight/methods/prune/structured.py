"""Structured pruning: whole channels, neurons and attention heads are taken away, and the network gets smaller."""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...core.context import Context
from ...core.fit import Training
from ...core.step import Between, OneOf, Place, Trait
from ...model.cost import macs, parameters
from ...model.cut import agreeing, remove, shell
from ...model.groups import Coupling, Cut, Slot, couple, tensors
from ...model.recalibrate import recalibrate
from ...model.select import LayerStep, excluded, unused
from .changes import loss_changes
from .latency import measure
from .layers import layers, producers, widths
from .plan import Limits, Price, by_rank, by_share, limits
from .scores import l1, l2, relative, slices

Scores = dict[int, Tensor]  # group -> one score per unit
Units = dict[Slot, int]  # (tensor, dimension) -> units of its group before the first round
SHORT = 0.02  # how far from the asked share a result may end without a warning


def unit_counts(coupling: Coupling) -> Units:
    """How many units the group of each slot has."""
    return {slot: len(group) for group in coupling.groups for slot in group.places}


class StructuredPrune(LayerStep, kind="prune.structured"):
    """Take away the least important channels, neurons and attention heads; what remains is a smaller dense network.

    `keep` is the share that is kept of the parameters, of the multiply-accumulates, or of the time that one input
    takes on the target (`of`; a table of widths is measured there in each round, see `prune.latency`). Units that can
    only go together are found by `featherweight.model.groups`, and their removal is checked against silencing them
    every time. A unit's score is the sum over all its slices in all coupled parameters: of magnitudes (`l1`), squares
    (`l2`, then the root), batch-norm scales (`bn`), or, on the calibration data, of the squared first-order change of
    the task's loss in each of them (`taylor`, arXiv:1906.10771) or in all together, input by input (`fisher`,
    arXiv:2108.00708). `scope` "global" ranks the units of all groups together, "layer" keeps the same share of each
    group. To be comparable, `taylor` and `fisher` are divided by what removing one unit of the group saves (loss per
    saved cost), the others by the mean of their group. `min_keep` is the share of units that every group keeps.

    The running statistics of batch norms are those of the larger network; `recalibrate` takes them anew on the
    calibration data after each round, as arXiv:2007.02491 does, which needs no labels.

    Kept widths are multiples of `multiple` (default: what the target likes) in every group that has at least two such
    steps; smaller groups give up single units. With `rounds` > 1 the share falls geometrically, scores are taken anew
    each time, and with `retrain` the network is trained after each round. `only` and `skip` choose layers by their
    outputs: a group is cut only if all layers that produce it are chosen. Raises `TaskError` if the model cannot be
    traced, or if `taylor` or `fisher` finds no labels.
    """

    needs = Trait.EDITABLE | Trait.RESHAPABLE
    paper = "arXiv:1608.08710, arXiv:1906.10771, arXiv:2108.00708"
    place = Place.RESHAPE

    keep: Annotated[float, Field(gt=0, lt=1), Between(0.3, 0.95)] = 0.7
    of: Literal["parameters", "macs", "latency"] = "macs"
    score: Annotated[Literal["l1", "l2", "bn", "taylor", "fisher"], OneOf("l1", "l2", "taylor")] = "l2"
    scope: Annotated[Literal["global", "layer"], OneOf("global", "layer")] = "global"
    rounds: Annotated[int, Field(ge=1, le=100)] = 1
    multiple: Annotated[int, Field(ge=1)] | None = None
    min_keep: Annotated[float, Field(ge=0, le=1)] = 0.1
    recalibrate: bool = True
    retrain: Training | None = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        before = {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}
        for glob in unused(model, (nn.Module,), self.only, self.skip):
            ctx.warn(f"{self.kind}: no layer matches {glob!r}")
        start, whole, reached, coupling = shell(model), 0.0, 1.0, None
        units: Units = {}
        for turn in range(1, self.rounds + 1):
            ctx.progress.say(f"{self.kind}: round {turn} of {self.rounds}")
            coupling = couple(model, ctx.example)
            units = units or unit_counts(coupling)
            price = self._price(model, start, ctx, coupling, units)
            whole = whole or price(np.array([len(group) for group in coupling.groups]))
            found = self._round(model, ctx, coupling, units, price, whole, self.keep ** (turn / self.rounds))
            if found is None:  # nothing to heal; the next round asks for more, which may be worth a whole step
                continue
            reached = found
            if self.recalibrate:
                recalibrate(model, ctx)
            if self.retrain is not None:
                ctx.fit(model, self.retrain, text=f"retraining after round {turn} of {self.kind}")
        assert coupling is not None
        self._report(model, ctx, coupling, before)
        if self.of == "latency":
            unit, now = ctx.seconds([start, model])
            reached = now / unit
        if abs(reached - self.keep) > SHORT:
            timed = "; between the widths that were measured time is guessed, and more rounds measure anew"
            ctx.warn(
                f"{self.kind} kept {reached:.1%} of the {self.of}, not {self.keep:.1%}: the layers left alone, "
                f"min_keep={self.min_keep} and widths in multiples of {self._multiple(ctx)} allow no nearer"
                f"{timed if self.of == 'latency' else ''}"
            )
        return model.eval()

    def _price(self, model: nn.Module, start: nn.Module, ctx: Context, coupling: Coupling, units: Units) -> Price:
        if self.of == "latency":
            bounds = self._bounds(ctx, coupling, units, self._eligible(model, coupling))
            return measure(model.eval(), start, ctx, coupling, bounds)
        return parameters(coupling) if self.of == "parameters" else macs(coupling)

    def _bounds(self, ctx: Context, coupling: Coupling, units: Units, places: list[int]) -> dict[int, Limits]:
        """How many units each of these groups may keep; `units` are those that they had before the first round."""
        found = {}
        for place in places:
            group = coupling.groups[place]
            whole = max(units.get(slot, len(group)) for slot in group.places)
            found[place] = limits(len(group), whole, self.min_keep, self._multiple(ctx), widths(group))
        return found

    def _multiple(self, ctx: Context) -> int:
        return self.multiple or max(1, ctx.width_multiple)

    def _round(
        self,
        model: nn.Module,
        ctx: Context,
        coupling: Coupling,
        units: Units,
        price: Price,
        whole: float,
        share: float,
    ) -> float | None:
        """Remove what must go for `price` to come down to `share` of `whole`; return the share that was reached, None
        if nothing went.
        """
        scores = self._scores(model, ctx, coupling, self._eligible(model, coupling))
        cut = self._plan(ctx, coupling, units, price, scores, share * whole)
        cut, failed = agreeing(
            coupling, copy.deepcopy(model).cpu(), {name: tensor.cpu() for name, tensor in ctx.example.items()}, cut
        )
        coupling.refused |= failed
        if not cut:
            return None
        remove(model, coupling, cut)
        kept = [len(group) - len(cut.get(place, ())) for place, group in enumerate(coupling.groups)]
        return price(np.array(kept)) / whole

    def _eligible(self, model: nn.Module, coupling: Coupling) -> list[int]:
        chosen = []
        for place in coupling.free():
            makers = producers(model, coupling.groups[place])
            if all(excluded(name, self.only, self.skip) is None for name in makers):
                chosen.append(place)
        return chosen

    def _plan(self, ctx: Context, coupling: Coupling, units: Units, price: Price, scores: Scores, target: float) -> Cut:
        """Which units of which groups to remove."""
        if not scores:
            return {}
        places = sorted(scores)
        bounds = list(self._bounds(ctx, coupling, units, places).values())
        everything = np.array([len(group) for group in coupling.groups])

        def price_of(kept: NDArray[np.int64]) -> float:
            counts = everything.copy()
            counts[places] = kept
            return price(counts)

        ranks = [scores[place].double().cpu().numpy() for place in places]
        if self.score in ("taylor", "fisher"):
            ranks = [rank / saved for rank, saved in zip(ranks, savings(price, everything, places))]
        kept = (
            by_rank(ranks, bounds, price_of, target) if self.scope == "global" else by_share(bounds, price_of, target)
        )
        lowest = (np.sort(np.argsort(rank, kind="stable")[: len(rank) - count]) for rank, count in zip(ranks, kept))
        return {place: units for place, units in zip(places, lowest) if len(units)}

    def _scores(self, model: nn.Module, ctx: Context, coupling: Coupling, places: list[int]) -> Scores:
        groups = {place: coupling.groups[place] for place in places}
        if self.score == "taylor" or self.score == "fisher":
            return loss_changes(model, ctx, coupling, groups, self.score)
        held, found = tensors(model), {}
        norms = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
        for place, group in groups.items():
            parts = []
            for (name, dim), positions in group.places.items():
                if name in coupling.parameters and (self.score != "bn" or name in norms):
                    rows = slices(
                        held[name].detach().float(), dim, torch.as_tensor(positions, device=held[name].device)
                    )
                    parts.append(l2(rows) if self.score == "l2" else l1(rows))
            if parts:
                total = torch.stack(parts).sum(0)
                found[place] = relative(total.sqrt() if self.score == "l2" else total)
            else:
                coupling.refused[place] = "it has no batch norm whose scale could be its score"
        return found

    def _report(self, model: nn.Module, ctx: Context, coupling: Coupling, before: dict[str, tuple[int, ...]]) -> None:
        """Every layer that changed, and every layer that did not and why.

        `coupling` is that of the last round, which knows why.
        """
        groups_of = {place: number for number, group in enumerate(coupling.groups) for place in group.places}
        after = {name: tuple(tensor.shape) for name, tensor in tensors(model).items()}
        for layer in layers(model):
            if how := layer.change(before, after):
                ctx.change(layer.name, how)
            else:
                place = (coupling.names[layer.outputs[0]], layer.outputs[1])
                ctx.leave(layer.name, self._reason(model, coupling, layer.name, place, groups_of.get(place)))

    def _reason(self, model: nn.Module, coupling: Coupling, name: str, place: Slot, number: int | None) -> str:
        """Why the outputs of a layer, counted at `place`, are all still there; `number` is their group, if any."""
        if reason := excluded(name, self.only, self.skip):
            return reason
        if number is None:
            return coupling.fixed.get(place, "its outputs all go together")
        if number in coupling.refused:
            return coupling.refused[number]
        for maker in producers(model, coupling.groups[number]):
            if reason := excluded(maker, self.only, self.skip):
                return f"it goes together with {maker}: {reason}"
        return "all of its units score higher than those that had to go"


def savings(price: Price, everything: NDArray[np.int64], places: list[int]) -> list[float]:
    """What removing one unit of each group at `places` saves in the whole network, as a share of its cost."""
    whole, found = price(everything), []
    for place in places:
        fewer = everything.copy()
        fewer[place] -= 1
        found.append(max((whole - price(fewer)) / whole, 1e-12))
    return found
