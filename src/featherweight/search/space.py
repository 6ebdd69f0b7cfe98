"""The space of recipes: for each place none or one of the methods that belong there, with the knobs that stand beside
their settings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import optuna

from ..core import registry
from ..core.encoding import holds_zeros
from ..core.recipe import Recipe
from ..core.step import Between, OneOf, Place, Step, knobs, step
from ..core.target import Target
from ..core.task import Task

NONE, EPOCHS = "none", "epochs"
ALONE = "_alone"  # ends the name of the parameter for a place where there must be a step
LEAST_EPOCHS = 0.1  # training for less is not worth starting

Params = dict[str, Any]


@dataclass(frozen=True)
class Space:
    """The methods that may stand at each place of a recipe, and what was left out and why.

    `longest` is the upper end of what one step may train, in epochs, where that is more than the knob's own range (a
    small data set has short epochs); `epochs` caps it at what the time allows; None is no cap.
    """

    kinds: Mapping[Place, tuple[type[Step], ...]]
    left_out: Mapping[str, str]
    heal_alone: bool = False
    longest: float = 0.0
    epochs: float | None = None

    @property
    def trains(self) -> bool:
        """Whether any method in it trains."""
        return any(kind.trains for kinds in self.kinds.values() for kind in kinds)

    def suggest(self, trial: optuna.Trial) -> Recipe:
        """A whole recipe from `trial`. Healing is offered only where something was taken away before it; at the last
        place there must be a step if there was none before.
        """
        steps: list[Step] = []
        for place, kinds in self.kinds.items():
            if (label := self._label(place, bool(steps))) is None:
                continue
            names = [kind.kind for kind in kinds]
            picked = trial.suggest_categorical(label, names if label.endswith(ALONE) else [NONE, *names])
            if picked != NONE:
                steps.append(step(picked, **self._settings(trial, Step.kinds[picked])))
        return Recipe(steps)

    def _label(self, place: Place, any_before: bool) -> str | None:
        """The parameter that says which method stands at `place`; None if none may. It has a name of its own where
        there must be one.
        """
        if place is Place.HEAL and not any_before and not self.heal_alone:
            return None
        must = not any_before and place is max(self.kinds)
        return place.name.lower() + (ALONE if must else "")

    def _settings(self, trial: optuna.Trial, kind: type[Step]) -> dict[str, Any]:
        found = {}
        for name, knob in self.knobs(kind).items():
            found[name] = _suggest(trial, f"{kind.kind}.{name}", knob, kind, name)
            if name == EPOCHS and self.epochs is not None:
                found[name] = tidy(min(found[name], self.epochs))
        return found

    def knobs(self, kind: type[Step]) -> dict[str, Between | OneOf]:
        """What may be varied in a step of this kind, with the range of epochs that suits the task."""
        found = knobs(kind)
        if isinstance(knob := found.get(EPOCHS), Between) and kind.trains:
            found[EPOCHS] = replace(knob, high=max(knob.high, tidy(self.longest)))
        return found

    def params(self, kinds: Mapping[Place, type[Step] | None], settings: Mapping[str, Any] | None = None) -> Params:
        """The parameters that make `suggest` give these methods with their default settings, but for `settings`
        ("kind.setting": value).
        """
        found: Params = {}
        any_before = False
        for place in self.kinds:
            kind = kinds.get(place)
            if (label := self._label(place, any_before)) is not None:
                found[label] = NONE if kind is None else kind.kind
            if kind is not None:
                any_before = True
                found |= {f"{kind.kind}.{name}": default for name, default in self._defaults(kind).items()}
        return found | dict(settings or {})

    def _defaults(self, kind: type[Step]) -> dict[str, Any]:
        """The default of every setting that may be varied, where it lies in the range."""
        given = {name: kind.model_fields[name].get_default(call_default_factory=True) for name in self.knobs(kind)}
        return {name: default for name, default in given.items() if _inside(default, self.knobs(kind)[name])}


def space_for(
    task: Task, target: Target, objective: str = "latency", longest: float = 0.0, epochs: float | None = None
) -> Space:
    """The space of what can work on `task` and `target`: methods are found through the registry.

    Left out, with the reason: methods that gain nothing in the objective (weights alone in few bits make files smaller,
    not faster), methods whose forms the target does not carry, methods that only make zeros where the
    target stores zeros as plain numbers, and methods that train where there are no training data or no time
    (`epochs`, what one step may train).
    """
    registry.load("methods")
    kinds: dict[Place, tuple[type[Step], ...]] = {}
    left: dict[str, str] = {}
    for place in Place:
        here = sorted((kind for kind in Step.kinds.values() if kind.place is place), key=lambda kind: kind.kind)
        for kind in here:
            if reason := _unusable(kind, task, target, objective, epochs):
                left[kind.kind] = reason
        kinds[place] = tuple(kind for kind in here if kind.kind not in left)
    return Space(
        {place: found for place, found in kinds.items() if found}, left, objective == "accuracy", longest, epochs
    )


def _unusable(kind: type[Step], task: Task, target: Target, objective: str, epochs: float | None) -> str:
    if any(field.is_required() and name not in knobs(kind) for name, field in kind.model_fields.items()):
        return "it has a setting without a default that the search does not know how to choose"
    if missing := kind.missing():
        return f"it needs {', '.join(missing)}, which is not installed"
    if objective != "accuracy" and objective not in kind.gains:
        return f"it makes nothing better in {objective}"
    if refused := target.refuses(kind.makes):
        return f"the target {target.name} does not carry {', '.join(refused)}"
    if kind.place is Place.SPARSIFY and not any(map(holds_zeros, target.carries)):
        return f"the target {target.name} stores zeros as plain numbers, so they make nothing smaller or faster"
    if kind.trains and not task.has("train"):
        return f"task {task.name} has no training data"
    if kind.trains and epochs is not None and epochs < LEAST_EPOCHS:
        return "there is no time to train"
    return ""


def tidy(value: float) -> float:
    """`value` with two significant digits, so that recipes can be read and prefixes are met again."""
    return value if value == 0 else round(value, 1 - math.floor(math.log10(abs(value))))


def _suggest(trial: optuna.Trial, label: str, knob: Between | OneOf, kind: type[Step], name: str) -> Any:
    if isinstance(knob, OneOf):
        return trial.suggest_categorical(label, list(knob.values))
    if _whole(kind, name):
        return trial.suggest_int(label, int(knob.low), int(knob.high), log=knob.log)
    return min(max(tidy(trial.suggest_float(label, knob.low, knob.high, log=knob.log)), knob.low), knob.high)


def _whole(kind: type[Step], name: str) -> bool:
    """Whether the setting is a whole number."""
    return kind.model_fields[name].annotation in (int, int | None)


def _inside(value: Any, knob: Between | OneOf) -> bool:
    if isinstance(knob, OneOf):
        return value in knob.values
    return isinstance(value, int | float) and knob.low <= value <= knob.high


def strength(kind: type[Step]) -> tuple[str, Between] | None:
    """The setting that says how much a method takes away: the first range among its knobs; None if it has none."""
    return next(((name, knob) for name, knob in knobs(kind).items() if isinstance(knob, Between)), None)


def at(knob: Between, share: float) -> float:
    """The value at `share` (0 to 1) of a range, with two significant digits."""
    if knob.log:
        return tidy(math.exp(math.log(knob.low) + share * (math.log(knob.high) - math.log(knob.low))))
    return tidy(knob.low + share * (knob.high - knob.low))
