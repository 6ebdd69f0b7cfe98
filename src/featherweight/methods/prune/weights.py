"""prune.weights: single connections, or patterns of them, are set to zero and held there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from ...core.context import Context
from ...core.fit import Training
from ...core.step import Between, OneOf, Place, Trait
from ...model.masks import drop_empty
from ...model.moments import Moments, observe
from ...model.select import LayerStep
from .connections import Connections, connections, observable
from .gradients import first_order_scores, fisher_scores
from .inputs import UPDATING, Rule, aim, block_by_block, in_chunks, in_order, usable
from .movement import Moving, exchange
from .patterns import Pattern, masks
from .saliency import magnitude
from .scores import cubic
from .sensitivity import Pruned, by_sensitivity

RAMP = 0.7  # share of the training during which the sparsity rises; the rest heals
GROUPS = r"[1-9]\d*:[1-9]\d*"  # n:m
UPDATES = 100  # how often masks change on the way
BY_INPUTS = ("wanda", "activation", *UPDATING)
Score = Literal["magnitude", "taylor", "fisher", "wanda", "activation", "movement", "obs", "sparsegpt"]
Held = Mapping[str, Connections]


class WeightPruning(LayerStep, kind="prune.weights"):
    """Set the connections of least worth in linear layers and convolutions to zero and hold them there.

    `sparsity` is the share of zeros among the weights of the chosen layers. `score` says what a connection is worth:
    its `magnitude`; what the loss changes by without it, to first order (`taylor`) or with the diagonal of the Fisher
    information (`fisher`: Optimal Brain Damage); what it carries, by the norm of its input (`wanda`) or the mean size
    of it (`activation`); whether training moves it away from zero (`movement`); or what the layer's output changes by
    once the others have made up for it: `obs` takes the cheapest next weight of each row exactly, `sparsegpt` goes
    column by column. With these two the other weights change too; `damping` is the share of the mean diagonal added to
    the second moment of the inputs, and `compensate` measures the error from where the original network was. What looks
    at inputs goes through the repeated blocks one after the other, each with inputs from the pruned ones before it.
    `pattern`: "none" takes single weights, [r, c] blocks of r outputs and c inputs, "row" whole outputs, "n:m" keeps n
    of every m neighbours. `scope` says what competes: weights of all layers (each keeps at least `min_keep`), of a
    layer, or of a row (an output); by default as in the score's paper. `allocation` gives every layer the same sparsity
    or, by `sensitivity`, the one for which the losses measured with one layer pruned at a time add up to least.
    `schedule`: `once`, then `retrain`; `gradual` raises the sparsity on a cubic curve in the first 70% of `retrain`;
    `rounds` prunes and retrains that many times. With `rewind` the network is trained before the first round as well,
    and before each retraining all weights go back to where they were at that share of the first (the lottery ticket).
    Weights that are zero already stay so. Biases, embeddings and shared weights are left alone.
    Raises `NotFinite` if calibration meets NaN.
    """

    takes: ClassVar[Trait] = Trait.RESHAPABLE
    place: ClassVar[Place | None] = Place.SPARSIFY
    paper: ClassVar[str] = (
        "arXiv:1506.02626, arXiv:1710.01878, arXiv:1906.10771, arXiv:2306.11695, arXiv:2005.07683, arXiv:2208.11580, "
        "arXiv:2301.00774, arXiv:1803.03635, arXiv:1903.01611"
    )

    sparsity: Annotated[float, Field(gt=0, lt=1), Between(0.1, 0.95)] = 0.5
    score: Annotated[Score, OneOf("magnitude", "fisher", "wanda", "sparsegpt")] = "magnitude"
    pattern: Annotated[str, Field(pattern=rf"^(none|row|{GROUPS})$")] | tuple[PositiveInt, PositiveInt] = "none"
    scope: Literal["global", "layer", "row"] | None = None
    allocation: Literal["uniform", "sensitivity"] = "uniform"
    min_keep: Annotated[float, Field(ge=0, le=1)] = 0.02
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    compensate: bool = False
    schedule: Literal["once", "gradual", "rounds"] = "once"
    rounds: Annotated[int, Field(ge=1, le=100)] = 3
    rewind: Annotated[float, Field(ge=0, lt=1)] | None = None
    retrain: Training | None = None

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, given: Any) -> Any:
        """A pattern n:m says the sparsity itself."""
        pattern = given.get("pattern") if isinstance(given, dict) else None
        if isinstance(pattern, str) and re.fullmatch(GROUPS, pattern) and "sparsity" not in given:
            kept, of = map(int, pattern.split(":"))
            return {**given, "sparsity": 1 - kept / of} if kept < of else given
        return given

    @model_validator(mode="after")
    def _fits(self) -> WeightPruning:
        problem = self._pattern_problem() or self._scope_problem() or self._schedule_problem()
        if problem:
            raise ValueError(problem)
        return self

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def _pattern_problem(self) -> str:
        shape = self.shape
        if shape.of and not 0 < shape.kept < shape.of:
            return f"the pattern {shape.name} keeps everything; n:m needs n below m"
        if shape.of and abs(self.sparsity - (1 - shape.kept / shape.of)) > 1e-6:
            return f"the pattern {shape.name} has a sparsity of {1 - shape.kept / shape.of:g}; leave sparsity out"
        if shape.of and (self.scope is not None or self.allocation != "uniform"):
            return f"with the pattern {shape.name} every group of {shape.of} competes; leave scope and allocation out"
        if shape.name == "row" and (self.score in UPDATING or self.scope == "row"):
            return "whole rows compete with other rows, and none makes up for another; take another score or scope"
        if self.score == "obs" and not shape.of and shape.name:
            return "obs takes single weights or n:m; for blocks use sparsegpt"
        return ""

    def _scope_problem(self) -> str:
        if self.score in BY_INPUTS and self.scope == "global":
            return f"scores of {self.score} say nothing across layers; set scope: layer or row"
        if self.allocation == "sensitivity" and (self.competing == "global" or self.score == "movement"):
            return "allocation by sensitivity needs scores before training that compete within layers; set scope: layer"
        if self._changed("min_keep") and self.competing != "global" and self.allocation == "uniform":
            return "min_keep is for what competes across layers (scope: global, or allocation: sensitivity)"
        if self.score not in UPDATING and (self._changed("damping") or self.compensate):
            return f"damping and compensate are settings of obs and sparsegpt; leave them out with {self.score}"
        return ""

    def _schedule_problem(self) -> str:
        if self.schedule != "once" and self.retrain is None:
            return f"the schedule {self.schedule} needs a training: set retrain"
        if self.schedule != "gradual" and self.score == "movement":
            return "movement is learned while the sparsity rises; set schedule: gradual"
        if self.schedule == "gradual" and self.score not in ("magnitude", "movement"):
            return f"a gradual schedule follows magnitude or movement; with {self.score} use schedule: rounds"
        if self.schedule != "rounds" and (self._changed("rounds") or self.rewind is not None):
            return "rounds and rewind are settings of schedule: rounds"
        if self.rewind is not None and self.score in UPDATING:
            return f"rewind takes back what {self.score} changes in the weights; leave it out, or take another score"
        return ""

    @property
    def shape(self) -> Pattern:
        """The pattern of zeros."""
        return Pattern.of_setting(self.pattern)

    @property
    def competing(self) -> str:
        """What competes: as set, or as in the score's paper, or what the other settings leave."""
        if self.scope is not None:
            return self.scope
        if self.score == "wanda" and self.shape.name != "row":
            return "row"
        return "layer" if self.score in BY_INPUTS or self.allocation == "sensitivity" else "global"

    def alone(self) -> WeightPruning:
        """Without what makes up for other layers or weighs them against each other."""
        return self.model_copy(update={"compensate": False, "allocation": "uniform"})

    # -- the step --------------------------------------------------------------------------------------------------
    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        every = connections(self, model, ctx, self.shape)
        held = self._open(self._seen(every, ctx), ctx)
        before = {name: int(each.mask.keep.sum()) for name, each in held.items()}
        if held:
            wanted = self._wanted(model, ctx, held)
            if self.schedule == "gradual":
                self._rise(model, ctx, held, wanted)
            elif self.schedule == "rounds":
                self._in_rounds(model, ctx, held, wanted)
            else:
                self._prune(model, ctx, held, wanted)
                if self.retrain is not None and any(int(held[name].mask.keep.sum()) < before[name] for name in held):
                    ctx.fit(model, self.retrain, text=f"retraining after {self.kind}")
            self._report(held, before, ctx)
        drop_empty([each.layer for each in every.values()])
        return model

    def _seen(self, every: Held, ctx: Context) -> Held:
        """The layers whose inputs can be seen, where the score needs them."""
        hidden = [name for name, each in every.items() if self.score in BY_INPUTS and not observable(each.layer)]
        for name in hidden:
            ctx.leave(name, f"its inputs cannot be lined up with its weights, which {self.score} needs")
        return {name: each for name, each in every.items() if name not in hidden}

    def _open(self, every: Held, ctx: Context) -> Held:
        """The layers that have fewer zeros than asked for (where all compete: together), or not in the pattern."""
        joint, found = zeros(every), {}
        for name, each in every.items():
            share = joint if self.competing == "global" else each.zeros
            if share < self.sparsity or self.shape.name not in ("", each.mask.pattern):
                found[name] = each
            else:
                ctx.leave(
                    name, f"{share:.1%} of the weights are zero already, sparsity={self.sparsity} asks for no more"
                )
        return found

    def _report(self, held: Held, before: dict[str, int], ctx: Context) -> None:
        for name, each in held.items():
            if int(each.mask.keep.sum()) < before[name]:
                each.mask.pattern = self.shape.name or each.mask.pattern
                how = f" in the pattern {self.shape.name}" if self.shape.name else ""
                ctx.change(name, f"{each.zeros:.1%} of {each.mask.keep.numel()} weights are zero{how}")
            elif name not in {left.layer for left in ctx.record.left}:
                ctx.leave(name, f"all of its {before[name]} weights are worth more than those that had to go")

    # -- when --------------------------------------------------------------------------------------------------------
    def _rise(self, model: nn.Module, ctx: Context, held: Held, wanted: dict[str, float]) -> None:
        """Train while the sparsity rises; movement pruning gathers its scores on the way."""
        assert self.retrain is not None
        start = {name: zeros(held) if self.competing == "global" else each.zeros for name, each in held.items()}
        moving = self.score == "movement"
        shown = {name: exchange(each, Moving(each.mask)) if moving else each for name, each in held.items()}
        done = -1

        def during(_model: nn.Module, t: float) -> None:
            nonlocal done
            if int(t * UPDATES) > done and (t <= RAMP or done < int(RAMP * UPDATES)):
                done = int(t * UPDATES)
                self._prune(model, ctx, shown, {name: cubic(wanted[name], t / RAMP, start[name]) for name in held})

        ctx.fit(model, self.retrain, during=during, text=f"{self.kind} at rising sparsity")
        for name, each in shown.items() if moving else ():
            exchange(each, held[name].mask)

    def _in_rounds(self, model: nn.Module, ctx: Context, held: Held, wanted: dict[str, float]) -> None:
        """Prune and train, `rounds` times; each round takes the same share of what the one before it left."""
        assert self.retrain is not None
        start = {name: zeros(held) if self.competing == "global" else each.zeros for name, each in held.items()}
        early = None if self.rewind is None else self._first_training(model, ctx, self.rewind)
        for turn in range(1, self.rounds + 1):
            left = {name: (1 - wanted[name]) / (1 - start[name]) for name in held}
            self._prune(model, ctx, held, {n: 1 - (1 - start[n]) * left[n] ** (turn / self.rounds) for n in held})
            if early is not None:
                model.load_state_dict(early, strict=False)
            ctx.fit(model, self.retrain, text=f"retraining after round {turn} of {self.kind}")

    def _first_training(self, model: nn.Module, ctx: Context, place: float) -> dict[str, Tensor]:
        """Train once; gives all tensors but the masks as they were at `place` of the training."""
        assert self.retrain is not None
        found: dict[str, Tensor] = {}

        def during(model: nn.Module, t: float) -> None:
            if t >= place and not found:
                state = model.state_dict()
                found.update({name: each.clone() for name, each in state.items() if not name.endswith(".keep")})

        ctx.fit(model, self.retrain, during=during, text=f"training before {self.kind}")
        return found

    # -- which -------------------------------------------------------------------------------------------------------
    def _prune(self, model: nn.Module, ctx: Context, held: Held, wanted: Mapping[str, float]) -> None:
        """Bring every layer to its wanted sparsity (where all compete: all together to the one they share)."""
        if self.score in BY_INPUTS:
            return self._by_inputs(model, ctx, held, wanted)
        self._mask(held, self._scores(model, ctx, held), wanted)
        return None

    def _scores(self, model: nn.Module, ctx: Context, held: Held) -> dict[str, Tensor]:
        if self.score == "taylor":
            return first_order_scores(model, ctx, held)
        if self.score == "fisher":
            return fisher_scores(model, ctx, held)
        if self.score == "movement":
            return {name: each.matrix(each.mask.score) for name, each in held.items() if isinstance(each.mask, Moving)}
        return {name: magnitude(each.weight) for name, each in held.items()}

    def _mask(self, held: Held, scores: Mapping[str, Tensor], wanted: Mapping[str, float]) -> None:
        # movement judges masked weights too: they may come back, but for those pruned before this step
        open_ = {n: each.matrix(each.before) if self.score == "movement" else each.allowed for n, each in held.items()}
        barred = [scores[name].masked_fill(~open_[name], -torch.inf) for name in held]
        found = masks(barred, [wanted[name] for name in held], self.shape, self.competing, self.min_keep)
        for (name, each), keep in zip(held.items(), found):
            each.put(keep & open_[name])

    def _by_inputs(self, model: nn.Module, ctx: Context, held: Held, wanted: Mapping[str, float]) -> None:
        def solve(each: Connections, moments: Moments) -> None:
            if usable(each, moments, ctx):
                weight = aim(each, moments, self.damping, ctx)
                each.put(*self._rule(each, moments, weight, ctx, wanted[each.name]))

        block_by_block(model, ctx, held, self.compensate, solve)

    @property
    def _rule(self) -> Rule:
        return Rule(self.score, self.shape, self.competing, self.damping)

    # -- how much of each layer ------------------------------------------------------------------------------------
    def _wanted(self, model: nn.Module, ctx: Context, held: Held) -> dict[str, float]:
        """The sparsity that each layer ends with."""
        if self.allocation == "uniform":
            return dict.fromkeys(held, self.sparsity)
        alone = self._alone(model, ctx, held)
        found = by_sensitivity(model, ctx, held, alone, self.sparsity, self.min_keep)
        return {name: found.get(name, self.sparsity) for name in held}

    def _alone(self, model: nn.Module, ctx: Context, held: Held) -> Iterator[tuple[str, Pruned]]:
        """For each layer what prunes it alone, with the network as it is around it."""
        if self.score not in BY_INPUTS:
            for name, score in self._scores(model, ctx, held).items():
                yield name, partial(self._mask_alone, score.masked_fill(~held[name].allowed, -torch.inf))
            return
        for some in in_chunks(held):
            for name, moments in observe(model, list(some), ctx).items():
                # one without inputs is left alone, and said so, when it is its turn to be pruned
                if moments.hessian is not None and bool(moments.hessian.any()):
                    each = some[name]
                    yield name, partial(self._rule, each, in_order(each, moments), each.weight, ctx)

    def _mask_alone(self, score: Tensor, share: float) -> tuple[Tensor, None]:
        return masks([score], [share], self.shape, self.competing)[0] & (score > -torch.inf), None


def zeros(held: Held) -> float:
    """The share of weights that the masks of these layers hold at zero."""
    total = sum(each.mask.keep.numel() for each in held.values())
    return 1 - sum(int(each.mask.keep.sum()) for each in held.values()) / total if total else 0.0
