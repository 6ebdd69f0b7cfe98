"""What to try first: every way to store the weights without training, then, method by method, how much may be taken
away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.run import Budget
from ..core.step import Between, Place, Step, knobs
from .choose import choose, meets
from .space import Params, Space, at, strength
from .study import Trial

STORE, TAKE = "store:", "take:"  # what the labels of plans begin with
TRIES = 5  # per method that takes away
SMALLEST = 0.06  # share of a range below which a bracket is not narrowed further


@dataclass(frozen=True)
class Plan:
    """A trial that is proposed by rule instead of by the sampler: its label in the study, and its parameters."""

    label: str
    params: Params


@dataclass(frozen=True)
class Try:
    """One strength that was tried: its share of the range, the bytes of the artifact, whether it met the bar; no
    bytes if it failed.
    """

    share: float
    bytes: int | None
    met: bool


def plan(space: Space, trials: Sequence[Trial], budget: Budget) -> Plan | None:
    """The next trial by rule; None when the rules have nothing left to propose and the sampler takes over.

    Depends on the space, the bar and the finished trials alone. Post-training recipes come first. Then each method
    that takes something away is tried together with the best of those, and with healing where there is any; the
    methods take turns, and each one's strength is bracketed between what meets the bar and what does not.
    """
    seen = {trial.plan for trial in trials}
    for kind in space.kinds.get(Place.ENCODE, ()):
        if STORE + kind.kind not in seen:
            return Plan(STORE + kind.kind, space.params({Place.ENCODE: kind}))
    taking = [kind for place in (Place.RESHAPE, Place.SPARSIFY) for kind in space.kinds.get(place, ())]
    counts = {kind: len(_tries(kind, trials, budget)) for kind in taking}
    for kind in sorted(taking, key=lambda kind: (counts[kind], kind.kind)):
        if (share := next_share(_tries(kind, trials, budget), strength(kind) is not None)) is not None:
            return Plan(f"{TAKE}{kind.kind}:{share}", _taking(space, kind, share, _best_store(space, trials, budget)))
    return None


def next_share(tries: Sequence[Try], ranged: bool = True) -> float | None:
    """Which share (0 to 1) of a method's range to try next; None if enough is known.

    The middle first, then three quarters; their sizes tell which way the artifact gets smaller. Then the middle
    between the strongest that met the bar and the weakest that did not, or half way to the end of the range where
    only one of them is known.
    """
    if not tries:
        return 0.5
    measured = [item for item in tries if item.bytes is not None]
    if not ranged or len(tries) >= TRIES or len(measured) < len(tries):
        return None
    if len(measured) == 1:
        return 0.75
    low, high = min(measured, key=lambda item: item.share), max(measured, key=lambda item: item.share)
    stronger_up = (high.bytes or 0) < (low.bytes or 0)
    met = [item.share if stronger_up else 1 - item.share for item in measured if item.met]
    missed = [item.share if stronger_up else 1 - item.share for item in measured if not item.met]
    floor, ceiling = max(met, default=0.0), min(missed, default=1.0)
    if ceiling - floor < SMALLEST * 2:
        return None
    middle = (floor + ceiling) / 2
    share = round(middle if stronger_up else 1 - middle, 3)
    return None if any(abs(item.share - share) < SMALLEST for item in tries) else share


def _tries(kind: type[Step], trials: Sequence[Trial], budget: Budget) -> list[Try]:
    found = []
    for trial in trials:
        if trial.plan.startswith(f"{TAKE}{kind.kind}:"):
            figures = trial.figures
            share = float(trial.plan.rpartition(":")[2])
            found.append(Try(share, figures.bytes if figures else None, figures is not None and meets(figures, budget)))
    return found


def _best_store(space: Space, trials: Sequence[Trial], budget: Budget) -> type[Step] | None:
    """The method of storage whose post-training trial was best; None if none could be done."""
    tried = {trial.index: trial for trial in trials if trial.plan.startswith(STORE) and trial.figures is not None}
    if not tried:
        return None
    best = choose({index: trial.figures for index, trial in tried.items() if trial.figures is not None}, budget)
    return Step.kinds[tried[best].plan.removeprefix(STORE)]


def _taking(space: Space, kind: type[Step], share: float, store: type[Step] | None) -> Params:
    heal = next(iter(space.kinds.get(Place.HEAL, ())), None)
    settings: Params = {}
    if (found := strength(kind)) is not None:
        settings[f"{kind.kind}.{found[0]}"] = at(found[1], share)
    if heal is not None and space.epochs is not None and isinstance(knob := knobs(heal).get("epochs"), Between):
        settings[f"{heal.kind}.epochs"] = min(max(space.epochs, knob.low), knob.high)
    places = {kind.place: kind, Place.HEAL: heal, Place.ENCODE: store}
    return space.params({place: item for place, item in places.items() if place is not None}, settings)
