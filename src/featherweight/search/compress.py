"""The search over combined recipes."""

from __future__ import annotations

import statistics
import time as clock
from collections.abc import Iterator
from dataclasses import dataclass

from ..core.data import is_map_style
from ..core.errors import FeatherweightError, Infeasible, OutputError
from ..core.run import Budget, Candidate
from ..core.step import Step
from .choose import choose, excess, front, meets, value
from .clock import Clock, affordable_epochs, epochs_of, seconds_per_epoch
from .judge import Judge
from .output import disk_reason
from .plan import STORE, plan
from .space import Space, space_for
from .study import Running, Study, Trial

PATIENCE = 16  # trials in a row that bring no new recipe: the space is exhausted
AXES_SECONDS = 25.0  # what the axes other than accuracy take at the end on a small model
TIMED_RUNS = 1200  # runs on one input that the latency axis is worth, batch 32 included


@dataclass
class Search:
    """Proposes recipes, measures them, and remembers; a search that was killed goes on from its study."""

    judge: Judge
    study: Study
    budget: Budget
    clock: Clock
    trials: int | None = None

    def run(self) -> None:
        """Try recipes until the trials or the time are used up, or nothing new is left to try."""
        while (running := self._next()) is not None:
            started = clock.perf_counter()
            self.judge.job.progress.say(f"trial {running.index + 1}: {running.recipe}")
            result = self._conduct(running)
            result = result.model_copy(update={"seconds": clock.perf_counter() - started})
            self._tell(running, result)
            self.study.keep("spent", self.clock.used)
            self.judge.job.progress.say(f"trial {running.index + 1}: {self._outcome(result)}")

    def _next(self) -> Running | None:
        if (running := self.study.left_over()) is not None:
            return running
        trials = self.study.finished()
        if self._over(trials):
            return None
        space = space_for(self.judge.task, self.judge.job.target, self.budget.objective)
        proposal = plan(space, trials, self.budget)
        if self.clock.limit is not None and not (proposal and proposal.label.startswith(STORE)):
            space = self._affordable(space, trials)
            proposal = plan(space, trials, self.budget)
        if proposal is None:
            return self.study.ask(space.suggest)
        return self.study.ask(space.suggest, proposal.params, proposal.label)

    def _over(self, trials: list[Trial]) -> bool:
        if self.trials is not None and len(trials) >= self.trials:
            return True
        known = {trial.digest for trial in trials[:-PATIENCE]}
        recent = trials[-PATIENCE:]
        if len(trials) > PATIENCE and all(trial.state == "refused" or trial.digest in known for trial in recent):
            self.judge.job.progress.say("nothing new is left to try")
            return True
        return bool(trials) and self._left(trials) < self._overhead(trials)

    # -- one trial -----------------------------------------------------------------------------------------------
    def _conduct(self, running: Running) -> Trial:
        """Refuse, reuse, or build, export and measure; what goes wrong with one recipe is kept with its reason."""
        recipe = running.recipe
        result = Trial(
            index=running.index, recipe=recipe.dump(), digest=recipe.digest(), state="failed", plan=running.plan
        )
        trials = self.study.finished()
        for earlier in trials:
            if earlier.digest == result.digest and earlier.state != "refused":
                return result.model_copy(
                    update={"state": earlier.state, "reason": earlier.reason, "figures": earlier.figures}
                )
        if reason := self._refusal(running, trials):
            return result.model_copy(update={"state": "refused", "reason": reason})
        try:
            figures = self.judge.judge(recipe, energy=self.budget.objective == "energy")
        except OutputError:
            raise
        except Exception as error:
            if (full := disk_reason(error)) is not None:
                raise OutputError(
                    f"cannot write {self.judge.job.out}: {full}; free some space and start again"
                ) from error
            return result.model_copy(update={"reason": _reason(error)})
        return result.model_copy(update={"state": "done", "figures": figures})

    def _refusal(self, running: Running, trials: list[Trial]) -> str:
        """Why this recipe is not even tried; empty if it is."""
        if not running.recipe.steps:
            return "it holds no step"
        try:
            running.recipe.check(self.judge.job.target)
        except FeatherweightError as error:
            return str(error)
        if self.clock.limit is not None and (epochs := sum(epochs_of(item) for item in running.recipe.steps)):
            needed, left = epochs * self._per_epoch() + self._overhead(trials), self._left(trials)
            if needed > left * 1.1:
                return f"it would take about {needed:.0f} s, and {max(left, 0):.0f} s are left"
        return ""

    def _tell(self, running: Running, result: Trial) -> None:
        if result.figures is None:
            self.study.tell(running, result)
        else:
            self.study.tell(running, result, value(result.figures, self.budget), excess(result.figures, self.budget))

    def _outcome(self, result: Trial) -> str:
        if (figures := result.figures) is None:
            return f"{result.state}: {result.reason}"
        name, met = self.judge.task.metric.name, "meets" if meets(figures, self.budget) else "misses"
        found = f"{name} {figures.accuracy:.4g} ({figures.drop:+.3g} lost), {figures.bytes:,} bytes"
        return f"{found}, {figures.latency_ms:.3g} ms; {met} the bar"

    # -- time ----------------------------------------------------------------------------------------------------
    def _affordable(self, space: Space, trials: list[Trial]) -> Space:
        """`space` with training capped: by a plan made once, so that several trained trials fit, and by what is left."""
        task = self.judge.task
        if not any(kind.trains for kinds in space.kinds.values() for kind in kinds):
            return space
        left, overhead, per_epoch = self._left(trials), self._overhead(trials), self._per_epoch()
        planned = float(self.study.note("epochs", lambda: affordable_epochs(left, per_epoch, overhead)))
        return space_for(
            task, self.judge.job.target, self.budget.objective, min(planned, max(0.0, (left - overhead) / per_epoch))
        )

    def _per_epoch(self) -> float:
        return float(
            self.study.note("seconds_per_epoch", lambda: seconds_per_epoch(self.judge.task, self.judge.job.seed))
        )

    def _overhead(self, trials: list[Trial]) -> float:
        """Seconds that a trial takes apart from training: from those that did not train, else from the original's own
        export and validation.
        """
        measured = [
            trial.seconds for trial in trials if trial.state == "done" and trial.seconds > 0.5 and not _trains(trial)
        ]
        return statistics.median(measured) if measured else self.judge.seconds

    def _left(self, trials: list[Trial]) -> float:
        """Seconds left for trials, once the end is set aside: the artifact after each step, accuracy on the test
        split, and the other axes.
        """
        task = self.judge.task
        larger = _length(task.test, 1) / max(1, _length(task.validate, 1)) if task.has("test") else 1.0
        timing = TIMED_RUNS * 2 * self.judge.latency_ms / 1e3
        return (
            self.clock.left
            - AXES_SECONDS
            - timing
            - 3 * self._overhead(trials)
            - 2 * larger * self.judge.validation_seconds
        )


def settle(search: Search) -> tuple[Trial, list[Candidate], bool]:
    """The chosen trial, every recipe that was tried as a candidate, and whether the chosen one only came nearest to
    the bar.

    Raises `Infeasible` if no recipe could be measured at all.
    """
    trials = list(_unique(search.study.finished()))
    tried = {trial.index: trial.figures for trial in trials if trial.figures is not None}
    if not tried:
        reasons = "; ".join(
            f"{trial.recipe['steps'] and trial.recipe['steps'][-1]['kind']}: {trial.reason}" for trial in trials[:2]
        )
        raise Infeasible(
            f"none of {len(trials)} recipes could be run ({reasons or 'none was proposed'}); no artifact was made"
        )
    chosen = choose(tried, search.budget)
    return (
        next(trial for trial in trials if trial.index == chosen),
        [_candidate(trial, search.budget, front(tried), chosen) for trial in trials],
        not meets(tried[chosen], search.budget),
    )


def _candidate(trial: Trial, budget: Budget, best: set[int], chosen: int) -> Candidate:
    found = Candidate(
        number=trial.index, recipe=trial.recipe, state=trial.state, reason=trial.reason, seconds=trial.seconds
    )
    if (figures := trial.figures) is None:
        return found
    measured = figures.model_dump(exclude={"latency_noise"})
    return found.model_copy(
        update={
            **measured,
            "feasible": meets(figures, budget),
            "front": trial.index in best,
            "chosen": trial.index == chosen,
        }
    )


def _unique(trials: list[Trial]) -> Iterator[Trial]:
    """The trials without those that repeat an earlier recipe, and without empty ones."""
    seen: set[str] = set()
    for trial in trials:
        if trial.digest not in seen and trial.recipe["steps"]:
            yield trial
        seen.add(trial.digest)


def _trains(trial: Trial) -> bool:
    return any(Step.kinds[item["kind"]].trains or item.get("retrain") for item in trial.recipe["steps"])


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, FeatherweightError) else f"{type(error).__name__}: {text}"


def _length(data: object, otherwise: int) -> int:
    """Inputs in a map-style data set, batches in a list of batches, else `otherwise`."""
    return len(data) if is_map_style(data) or hasattr(data, "__len__") else otherwise  # type: ignore[arg-type]
