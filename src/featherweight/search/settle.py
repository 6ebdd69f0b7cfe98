"""The end of a search: who wins, and what is told of all that were tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..core.errors import Infeasible
from ..core.recipe import Recipe
from ..core.run import Budget, Candidate
from ..measure.statistics import speedup
from .choose import Figures, choose, contenders, front, meets
from .compress import Search
from .judge import ORIGINAL, Judge, half_width
from .output import FAILURES, work_folder
from .study import Trial


@dataclass(frozen=True)
class Settled:
    """The chosen recipe, every recipe that was tried, and whether the chosen one only came nearest to the bar."""

    recipe: Recipe
    candidates: list[Candidate]
    nearest: bool


def settle(search: Search) -> Settled:
    """Choose among the finished trials; where latency counts, the fastest few are timed side by side first.

    Raises `Infeasible` if no recipe could be measured at all.
    """
    trials = list(_unique(search.study.finished()))
    tried = {trial.index: trial.figures for trial in trials if trial.figures is not None}
    if not tried:
        reasons = "; ".join(f"{trial.recipe['steps'][-1]['kind']}: {trial.reason}" for trial in trials[:2])
        said = f"none of {len(trials)} recipes could be run ({reasons or 'none was proposed'})"
        kept = search.judge.job.out / FAILURES
        said += f"; the tracebacks are in {kept}" if any(trial.traceback for trial in trials) else ""
        raise Infeasible(f"{said}; no artifact was made")
    if search.budget.objective == "latency" and search.allowance.fits_heat():
        tried |= heat(search.judge, tried, {trial.index: trial for trial in trials}, search.budget)
    chosen = choose(tried, search.budget)
    recipes = {trial.index: trial.recipe for trial in trials}
    best = front(tried)
    candidates = [_candidate(trial, tried.get(trial.index), search.budget, trial.index in best) for trial in trials]
    for candidate in candidates:
        candidate.chosen = candidate.number == chosen
    return Settled(Recipe(recipes[chosen]["steps"]), candidates, not meets(tried[chosen], search.budget))


def heat(judge: Judge, tried: Mapping[int, Figures], trials: Mapping[int, Trial], budget: Budget) -> dict[int, Figures]:
    """The contenders with their latencies from one interleaved run of all of them; empty if there is no contest."""
    numbers = contenders(tried, budget)
    if len(numbers) < 2:
        return {}
    judge.job.progress.say(f"the {len(numbers)} fastest side by side")
    artifacts = {ORIGINAL: judge.original}
    for number in numbers:
        recipe = Recipe(trials[number].recipe["steps"])
        model, _ = judge.job.build(recipe)
        artifacts[str(number)] = judge.job.export(model, recipe, work_folder(judge.job.out, f"contender{number}"))
    samples = judge.time(artifacts)
    found = {}
    for number in numbers:
        ratio = speedup(samples[ORIGINAL], samples[str(number)], seed=judge.job.seed)
        timed = {"latency_ms": judge.latency_ms / ratio.value, "latency_noise": half_width(ratio)}
        found[number] = tried[number].model_copy(update=timed)
    return found


def _candidate(trial: Trial, figures: Figures | None, budget: Budget, front: bool) -> Candidate:
    found = Candidate(
        number=trial.index, recipe=trial.recipe, state=trial.state, reason=trial.reason, seconds=trial.seconds
    )
    if figures is None:
        return found
    measured = figures.model_dump(exclude={"latency_noise"})
    return found.model_copy(update={**measured, "feasible": meets(figures, budget), "front": front})


def _unique(trials: list[Trial]) -> Iterator[Trial]:
    """One trial per recipe: the first that was measured, else the first; none for a recipe without steps."""
    best: dict[str, Trial] = {}
    for trial in trials:
        known = best.setdefault(trial.digest, trial)
        if known.figures is None and trial.figures is not None:
            best[trial.digest] = trial
    return (trial for trial in best.values() if trial.recipe["steps"])
