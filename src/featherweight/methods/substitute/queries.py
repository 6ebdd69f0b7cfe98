"""substitute.queries: keys and values of few heads, which several heads of queries share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...core.context import Context
from ...core.fit import Training
from ...core.outputs import first
from ...core.soft import fold
from ...core.step import OneOf, Place, Trait
from ...model.attention import Attention, attentions
from ...model.graph import captured
from ...model.grouped import GroupedHeads
from ...model.imitation import missed
from ...model.matrices import sharers
from ...model.moments import observe
from ...model.replacing import called, exchanged
from ...model.select import LayerStep, excluded
from .heads import balanced, damped, missed_share, outward, pooled, shared

Values = dict[str, tuple[Tensor, Tensor | None]]  # weight and bias of layers by full name
EQUAL = 1e-6  # of the energy of the outputs


class GroupedQueries(LayerStep, kind="substitute.queries"):
    """Let each `pool` neighbouring heads of keys and values become one, which all their heads of queries share.

    The layers of keys and values then make fewer heads and hand each on several times (`GroupedHeads`), so that what
    surrounds them stays as it is. With `fit` "mean" the heads' weights are averaged (Ainslie et al.). With
    "least_squares" the shared head is the best for what all heads do with it, on the second moment of the layers' own
    inputs: for values, what the layer behind the attention makes of them; for keys, their products with the queries;
    those two layers are changed to match. That needs keys that nothing turns between (rotations by position do), and a
    layer right behind the values; where it is not so the mean is taken, and it is said. A bias of values moves into the
    layer behind, that of keys falls away, which softmax does not see. With `retrain` the network is then trained.

    Attentions are found in the captured graph, by a softmax between two products; one whose queries, keys and values
    do not come from a linear layer each is left alone by name. Raises `TaskError` if the model cannot be captured.
    """

    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    place: ClassVar[Place | None] = None  # on request: it seldom goes without training
    paper: ClassVar[str] = "arXiv:2305.13245"

    pool: Annotated[int, Field(ge=2), OneOf(2, 4)] = 2
    fit: Literal["least_squares", "mean"] = "least_squares"
    retrain: Training | None = None

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        free = {name: ctx.task.free(name) for name in ctx.example}
        graph = captured(fold(model), ctx.example, free)
        self.layers(model, ctx, (nn.Linear,))
        touched: set[str] = set()
        for found in attentions(graph):
            if isinstance(found, tuple):
                ctx.leave(*found)
            elif reason := self._obstacle(found, model, ctx):
                ctx.leave(found.key, reason)
                ctx.leave(found.value, reason)
            else:
                touched |= self._group(found, model, ctx)
        told = touched | {each.layer for each in ctx.record.left}
        for name, module in model.named_modules():
            within = name.rpartition(".")[0] in touched  # the layer within a new one
            if name not in told and not within and any(True for _ in module.parameters(recurse=False)):
                ctx.leave(name or type(module).__name__, "makes no keys or values of an attention")
        if self.retrain is not None and touched:
            ctx.fit(model, self.retrain, text=f"retraining after {self.kind}")
        return model

    def _obstacle(self, found: Attention, model: nn.Module, ctx: Context) -> str:
        """Why the heads of an attention are left as they are; empty if they become fewer."""
        for name in (found.key, found.value):
            if reason := excluded(name, self.only, self.skip):
                return reason
            if reason := _unfit(name, model, ctx):
                return reason
        for name, width in ((found.key, found.width), (found.value, found.depth)):
            if (inputs := model.get_parameter(f"{name}.weight").shape[1]) < width:  # the second of two factors
                return f"its {inputs} inputs are fewer than the {width} entries of a head"
        if found.heads % self.pool:
            return f"pool={self.pool} does not divide its {found.heads} heads of keys and values"
        return ""

    @torch.no_grad()
    def _group(self, found: Attention, model: nn.Module, ctx: Context) -> set[str]:
        """Put fewer heads in place; the names of the layers that were changed."""
        moments = observe(model, list(dict.fromkeys((found.query, found.key, found.value))), ctx)
        seen = {name: each.mean()[0].double() for name, each in moments.items()}
        notes: dict[str, str] = {}
        if self.fit == "least_squares":
            found, notes = self._fitting(found, seen, model, ctx)
        fitted = self.fit == "least_squares"
        values, errors = _few(found, _held(found, model), seen, self.pool, fitted)
        few = found.heads // self.pool
        for name, width in ((found.key, found.width), (found.value, found.depth)):
            weight, bias = values.pop(name)
            old: Any = model.get_submodule(name)
            made = GroupedHeads(weight.shape[1], few, width, self.pool, bias is not None).to(old.weight)
            _fill(made, {"heads": (weight, bias)})
            exchanged(model, name, made)
            how = f"{errors[name]:.1%} of what they do missed" if name in errors else f"means of {self.pool}"
            ctx.change(name, f"{found.heads} heads to {few}, {how}" + (f"; {notes[name]}" if name in notes else ""))
        _fill(model, values)
        for name in values:
            ctx.change(name, f"matched to fewer heads of {'keys' if name == found.query else 'values'}")
        return {found.key, found.value, *values}

    def _fitting(
        self, found: Attention, seen: Mapping[str, Tensor], model: nn.Module, ctx: Context
    ) -> tuple[Attention, dict[str, str]]:
        """The attention as far as layers can be matched, and why its keys or its values, by name, cannot be.

        That the layers do what is thought of them is tried: with as many heads as before the outputs must stay.
        """
        notes: dict[str, str] = {}
        if found.turned:
            notes[found.key] = "keys are turned between their layer and the product"
        elif reason := _unfit(found.query, model, ctx):
            notes[found.key] = f"{found.query} {reason}"
            found = found.with_turned()
        if not found.output:
            notes[found.value] = "no linear layer is right behind the values"
        elif reason := _unfit(found.output, model, ctx):
            notes[found.value] = f"{found.output} {reason}"
            found = found.without_output()
        before, wanted = _held(found, model), first(model(**ctx.example))
        _fill(model, _few(found, before, seen, 1, True)[0])
        equal = bool(missed(first(model(**ctx.example)), wanted) <= EQUAL)
        _fill(model, before)
        if not equal:
            other = dict.fromkeys((found.key, found.value), "matched layers would give something else")
            return found.with_turned().without_output(), other | notes
        return found, notes


def _unfit(name: str, model: nn.Module, ctx: Context) -> str:
    """Why a layer cannot be changed; empty if it can."""
    layer = model.get_submodule(name)
    if isinstance(model.get_submodule(name.rpartition(".")[0]), GroupedHeads):
        return "has shared heads already"
    if type(layer) is not nn.Linear or parametrize.is_parametrized(layer):
        return "is no plain linear layer: its weight is masked or stored otherwise"
    if sharers(model, layer):
        return "shares its weight with another layer"
    return "" if name in called(model, [name], ctx) else "is not called: what surrounds it uses its weight as it is"


def _held(found: Attention, model: nn.Module) -> Values:
    """Copies of the weights and biases of the layers of an attention."""
    held: Values = {}
    for name in (found.query, found.key, found.value, found.output):
        if name:
            layer: Any = model.get_submodule(name)
            held[name] = (layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone())
    return held


@torch.no_grad()
def _fill(model: nn.Module, values: Values) -> None:
    for name, (weight, bias) in values.items():
        layer: Any = model.get_submodule(name)
        dtype = layer.weight.dtype
        layer.weight = nn.Parameter(weight.to(dtype))
        layer.bias = None if bias is None else nn.Parameter(bias.to(dtype))


def _few(
    found: Attention, held: Values, seen: Mapping[str, Tensor], pool: int, fitted: bool
) -> tuple[Values, dict[str, float]]:
    """What the layers of an attention hold where each `pool` heads of keys and values are one, and what is missed."""
    values: Values = {}
    errors: dict[str, float] = {}
    if fitted and not found.turned:
        values |= _keys(found, held, seen, pool, errors)
    else:
        values[found.key] = _mean(*held[found.key], found.heads, pool)
    if fitted and found.output:
        values |= _values(found, held, seen, pool, errors)
    else:
        values[found.value] = _mean(*held[found.value], found.heads, pool)
    return values, errors


def _mean(weight: Tensor, bias: Tensor | None, heads: int, pool: int) -> tuple[Tensor, Tensor | None]:
    mean = pooled(weight.unflatten(0, (heads, -1)), pool).flatten(0, 1)
    return mean, None if bias is None else pooled(bias.unflatten(0, (heads, -1))[..., None], pool).flatten()


def _keys(found: Attention, held: Values, seen: Mapping[str, Tensor], pool: int, errors: dict[str, float]) -> Values:
    """Keys of fewer heads, and queries that have nearly the same products with them."""
    (query, shift), (key, _) = held[found.query], held[found.key]
    queries = query.double().unflatten(0, (found.heads * found.shared, -1))
    shifts = torch.zeros(len(query)) if shift is None else shift
    queries = torch.cat([queries, shifts.to(queries).unflatten(0, (len(queries), -1))[..., None]], -1)
    keys = key.double().unflatten(0, (found.heads, -1)).repeat_interleave(found.shared, 0)
    maps = queries.mT @ keys  # a head's queries as a function of its keys' inputs, the bias of queries last
    root = torch.linalg.cholesky(damped(seen[found.query])).T
    heavy = torch.cat([root @ maps[:, :-1], maps[:, -1:]], 1)  # as much as the inputs of queries weigh
    few, outer, share = [], [], []
    for part, weighed in zip(maps.split(pool * found.shared), heavy.split(pool * found.shared)):
        inner = shared(weighed, seen[found.key], found.width)[0]
        inner, own = balanced(inner, outward(part, seen[found.key], inner))
        share.append(missed_share(weighed, seen[found.key], inner, outward(weighed, seen[found.key], inner)))
        few.append(inner)
        outer.append(own.mT)
    rows = torch.cat(outer).flatten(0, 1)
    errors[found.key] = sum(share) / len(share)
    bias = None if shift is None else rows[:, -1]
    return {found.key: (torch.cat(few), None), found.query: (rows[:, :-1], bias)}


def _values(found: Attention, held: Values, seen: Mapping[str, Tensor], pool: int, errors: dict[str, float]) -> Values:
    """Values of fewer heads, and a layer behind them that makes nearly the same of them."""
    (value, shift), (output, after) = held[found.value], held[found.output]
    heads = found.heads * found.shared
    readers = output.double().unflatten(1, (heads, -1)).movedim(1, 0)  # [heads, outputs, depth]
    own = value.double().unflatten(0, (found.heads, -1)).repeat_interleave(found.shared, 0)
    few, outer, share = [], [], []
    for part in (readers @ own).split(pool * found.shared):
        inner, back = balanced(*shared(part, seen[found.value], found.depth))
        share.append(missed_share(part, seen[found.value], inner, back))
        few.append(inner)
        outer.append(back)
    errors[found.value] = sum(share) / len(share)
    bias = after
    if shift is not None:  # the weights of an attention add up to one: what they weigh evenly is a constant behind it
        shifts = shift.double().unflatten(0, (found.heads, -1)).repeat_interleave(found.shared, 0)
        moved = torch.einsum("hod,hd->o", readers, shifts)
        bias = moved if after is None else after.double() + moved
    return {found.value: (torch.cat(few), None), found.output: (torch.cat(outer).movedim(0, 1).flatten(1), bias)}
