"""What to try first: every way to store the weights without training, then, method by method, how much may be taken
away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..core.run import Budget
from ..core.step import Between, Place, Step
from .choose import choose, meets
from .space import EPOCHS, Params, Space, at, strength, tidy
from .study import Trial

STORE, TAKE = "store:", "take:"  # what the labels of plans begin with
SKIPPING = ":skip"  # ends the label of a way to store that leaves out the layers which a diagnosis named
Skips = Mapping[str, tuple[str, ...]]  # method -> layers that it leaves alone
TRIES = 5  # per method that takes away
HEALING = 0.3  # share of the longest training that heals what was taken away, where no time limit says otherwise
SMALLEST = 0.06  # share of a range below which a bracket is not narrowed further


@dataclass(frozen=True)
class Plan:
    """A trial that is proposed by rule instead of by the sampler: its label in the study, its parameters, and the
    layers that its methods leave alone.
    """

    label: str
    params: Params
    skips: Skips = field(default_factory=dict)


@dataclass(frozen=True)
class Try:
    """One strength that was tried: its share of the range, the bytes of the artifact, whether it met the bar; no
    bytes if it failed.
    """

    share: float
    bytes: int | None
    met: bool


def plan(
    space: Space, trials: Sequence[Trial], budget: Budget, limit: float | None = None, skips: Skips | None = None
) -> Plan | None:
    """The next trial by rule; None when the rules have nothing left to propose and the sampler takes over.

    Depends on the space, the bar, the time limit, the finished trials and the diagnosis alone (`skips`: ways to store
    the weights that are to be tried again without these layers). What was planned within another
    `limit` (a resumed run is given more time, say) is planned again, but for storage without training: whether there
    was time to train, and for how long, followed from that limit. Post-training recipes come first. Then each method
    that takes something away is tried together with the best of those, and with healing where there is any; the
    methods take turns, and each one's strength is bracketed between what meets the bar and what does not.
    """
    current = [trial for trial in trials if trial.limit == limit]
    seen = {trial.plan for trial in trials if trial.limit == limit or not trial.trains}
    for kind in space.kinds.get(Place.ENCODE, ()):
        if STORE + kind.kind not in seen:
            return Plan(STORE + kind.kind, space.params({Place.ENCODE: kind}))
    for name, layers in (skips or {}).items():
        if layers and STORE + name + SKIPPING not in seen:
            params = space.params({Place.ENCODE: Step.kinds[name]})
            return Plan(STORE + name + SKIPPING, params, {name: layers})
    taking = [kind for place in (Place.RESHAPE, Place.SPARSIFY) for kind in space.kinds.get(place, ())]
    counts = {kind: len(_tries(kind, current, budget)) for kind in taking}
    for kind in sorted(taking, key=lambda kind: (counts[kind], kind.kind)):
        tries = _tries(kind, current, budget)
        share = next_share(tries, kind.place is Place.SPARSIFY) if strength(kind) or not tries else None
        if share is not None:
            best = best_store(trials, budget)
            store = None if best is None else Step.kinds[_stored_by(best)]
            return Plan(f"{TAKE}{kind.kind}:{share}", _taking(space, kind, share, store), _skips(best))
    return None


def next_share(tries: Sequence[Try], stronger_up: bool = False) -> float | None:
    """Which share (0 to 1) of a method's range to try next; None if enough is known.

    The middle first; then a quarter from the end that is guessed to take away more if that met the bar, from the
    other end if not (`stronger_up` is the guess; from the second try on the sizes tell). Then the middle between the
    strongest that met the bar and the next stronger that did not, or half way to the end of the range where only one
    of them is known.
    """
    if not tries:
        return 0.5
    if len(tries) >= TRIES or any(item.bytes is None for item in tries):
        return None
    low, high = min(tries, key=lambda item: item.share), max(tries, key=lambda item: item.share)
    if len(tries) > 1:
        stronger_up = (high.bytes or 0) < (low.bytes or 0)
    met = [_strength(item.share, stronger_up) for item in tries if item.met]
    floor = max(met, default=0.0)
    missed = [_strength(item.share, stronger_up) for item in tries if not item.met]
    ceiling = min((share for share in missed if share > floor), default=1.0)
    share = round(_strength((floor + ceiling) / 2, stronger_up), 3)
    return None if any(abs(item.share - share) < SMALLEST for item in tries) else share


def _strength(share: float, stronger_up: bool) -> float:
    """A share of the range as a share of how much is taken away, and back."""
    return share if stronger_up else 1 - share


def _tries(kind: type[Step], trials: Sequence[Trial], budget: Budget) -> list[Try]:
    found = []
    for trial in trials:
        if trial.plan.startswith(f"{TAKE}{kind.kind}:"):
            figures = trial.figures
            share = float(trial.plan.rpartition(":")[2])
            found.append(Try(share, figures.bytes if figures else None, figures is not None and meets(figures, budget)))
    return found


def best_store(trials: Sequence[Trial], budget: Budget) -> Trial | None:
    """The best of the post-training trials that only store the weights; None if none could be done."""
    tried = {trial.index: trial for trial in trials if trial.plan.startswith(STORE) and trial.figures is not None}
    if not tried:
        return None
    return tried[choose({index: trial.figures for index, trial in tried.items() if trial.figures is not None}, budget)]


def _stored_by(trial: Trial) -> str:
    """The method of a trial that only stores the weights."""
    return trial.plan.removeprefix(STORE).removesuffix(SKIPPING)


def _skips(trial: Trial | None) -> Skips:
    """The layers that the methods of a trial leave alone."""
    steps = [] if trial is None else trial.recipe["steps"]
    return {item["kind"]: tuple(item["skip"]) for item in steps if item.get("skip")}


def _taking(space: Space, kind: type[Step], share: float, store: type[Step] | None) -> Params:
    heal = next(iter(space.kinds.get(Place.HEAL, ())), None)
    settings: Params = {}
    if (found := strength(kind)) is not None:
        settings[f"{kind.kind}.{found[0]}"] = at(found[1], share)
    if heal is not None and isinstance(knob := space.knobs(heal).get(EPOCHS), Between):
        usual = heal.model_fields[EPOCHS].get_default(call_default_factory=True)
        wanted = max(usual or 0.0, HEALING * space.longest) if space.epochs is None else space.epochs
        settings[f"{heal.kind}.{EPOCHS}"] = tidy(min(max(wanted, knob.low), knob.high))
    places = {kind.place: kind, Place.HEAL: heal, Place.ENCODE: store}
    return space.params({place: item for place, item in places.items() if place is not None}, settings)
