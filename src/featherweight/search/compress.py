"""The search over combined recipes."""

from __future__ import annotations

import time as clock
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import optuna

from ..core.diagnosis import Diagnosis
from ..core.errors import FeatherweightError, OutputError
from ..core.files import disk_message, write_text
from ..core.recipe import Recipe
from ..core.run import Budget
from ..core.step import Step
from ..model.select import LayerStep
from .allowance import Allowance
from .choose import excess, meets, value
from .clock import Clock
from .diagnose import diagnose
from .judge import Judge
from .output import FAILURES
from .plan import SKIPPING, STORE, Skips, best_store, plan
from .space import Space, space_for
from .study import Running, Study, Trial

DIAGNOSIS = "diagnosis"  # its name among the study's notes
EXAMINED = 256  # inputs that a diagnosis looks at
PATIENCE = 16  # trials in a row that bring no new recipe: the space is exhausted


@dataclass
class Search:
    """Proposes recipes, measures them, and remembers; a search that was killed goes on from its study."""

    judge: Judge
    study: Study
    budget: Budget
    clock: Clock
    trials: int | None = None

    def __post_init__(self) -> None:
        self.allowance = Allowance(self.judge, self.study, self.clock)

    def run(self) -> None:
        """Try recipes until the trials or the time are used up, or nothing new is left to try.

        First of all what an earlier run in the same folder left: the trial that it was working on when it was killed,
        and those that failed for a reason that may be gone by now.
        """
        doubtful = {trial.index for trial in self.study.finished() if trial.traceback}
        if (running := self.study.left_over()) is not None:
            self._try(running)
            doubtful.discard(running.index)
        for index in sorted(doubtful):
            if not self.allowance.over():
                self._try(self.study.again(index))
        while (running := self._next()) is not None:
            self._try(running)

    def warnings(self) -> Iterator[str]:
        """A line for each trial that failed for a reason that may not be its recipe's."""
        for trial in self.study.finished():
            if trial.traceback:
                where = f"the traceback is in {self.judge.job.out / trial.traceback}"
                yield (
                    f"trial {trial.index + 1} failed unexpectedly ({trial.reason}); {where}; it is tried again when "
                    "the search goes on"
                )

    def _try(self, running: Running) -> None:
        started = clock.perf_counter()
        self.judge.job.progress.say(f"trial {running.index + 1}: {running.recipe}")
        result = self._conduct(running)
        result = result.model_copy(update={"seconds": clock.perf_counter() - started})
        self._tell(running, result)
        if not result.traceback:
            (self.judge.job.out / _failure(running)).unlink(missing_ok=True)  # of an earlier try
        self.study.keep("spent", self.clock.used)
        self.judge.job.progress.say(f"trial {running.index + 1}: {self._outcome(result)}")

    def _next(self) -> Running | None:
        trials = self.study.finished()
        if self._over(trials):
            return None
        space, limit = self._space(), self.clock.limit
        proposal = plan(space, trials, self.budget, limit)
        if not (proposal and proposal.label.startswith(STORE)):
            if self.allowance.limited:
                space = self._space(self.allowance.epochs() if space.trains else None)
            proposal = plan(space, trials, self.budget, limit, self._skips(trials))
        if proposal is None:
            return self.study.ask(space.suggest, limit=limit)
        suggest = partial(_suggested, space, proposal.skips)
        return self.study.ask(suggest, proposal.params, proposal.label, limit)

    def _skips(self, trials: list[Trial]) -> Skips:
        """What the best way to store the weights should leave alone, where none meets the bar of the drop: by a
        diagnosis, made once.
        """
        best = best_store([trial for trial in trials if not trial.plan.endswith(SKIPPING)], self.budget)
        if best is None or best.figures is None or excess(best.figures, self.budget).get("drop", 0.0) <= 0:
            return {}
        kind = best.recipe["steps"][-1]["kind"]
        if not issubclass(Step.kinds[kind], LayerStep):
            return {}
        kept = self.study.note(DIAGNOSIS, lambda: self._diagnose(best).model_dump(mode="json"))
        found = Diagnosis.model_validate(kept)
        return {found.method["kind"]: tuple(found.skip)} if found.skip else {}

    def _diagnose(self, trial: Trial) -> Diagnosis:
        job = self.judge.job
        job.progress.say(
            f"no way to store the weights meets the bar: which layers of {trial.recipe['steps'][-1]['kind']}?"
        )
        recipe = Recipe(trial.recipe["steps"])
        return diagnose(job.task, recipe, job.split, EXAMINED, self.budget.max_drop, job.seed, job.progress)

    def diagnosis(self) -> Diagnosis | None:
        """What was found out about the layers, if anything had to be."""
        kept = self.study.kept(DIAGNOSIS, None)
        return None if kept is None else Diagnosis.model_validate(kept)

    def _space(self, epochs: float | None = None) -> Space:
        job, longest = self.judge.job, self.allowance.longest()
        return space_for(job.task, job.target, self.budget.objective, longest, epochs)

    def _over(self, trials: list[Trial]) -> bool:
        if self.trials is not None and len(trials) >= self.trials:
            return True
        known = {trial.digest for trial in trials[:-PATIENCE]}
        recent = trials[-PATIENCE:]
        sampled = all(trial.limit == self.clock.limit and not trial.plan for trial in recent)
        idle = all(trial.state == "refused" or trial.digest in known for trial in recent)
        if len(trials) > PATIENCE and sampled and idle:
            self.judge.job.progress.say("nothing new is left to try")
            return True
        return self.allowance.over()

    # -- one trial -----------------------------------------------------------------------------------------------
    def _conduct(self, running: Running) -> Trial:
        """Refuse, reuse, or build, export and measure; what goes wrong with one recipe is kept with its reason.

        Only a `FeatherweightError` says something about the recipe. Anything else (memory that ran out, a file that was
        gone, a mistake in a method) is kept with its traceback, and not taken for the recipe's result.
        """
        recipe = running.recipe
        result = Trial(
            index=running.index,
            recipe=recipe.dump(),
            digest=recipe.digest(),
            state="failed",
            plan=running.plan,
            limit=running.limit,
        )
        for earlier in self.study.finished():
            if earlier.digest == result.digest and earlier.state != "refused" and not earlier.traceback:
                found = {"state": earlier.state, "reason": earlier.reason, "figures": earlier.figures}
                return result.model_copy(update={**found, "copied": True})
        if reason := self._refusal(running):
            return result.model_copy(update={"state": "refused", "reason": reason})
        try:
            figures = self.judge.judge(recipe, energy=self.budget.objective == "energy")
        except OutputError:
            raise
        except FeatherweightError as error:
            return result.model_copy(update={"reason": _one_line(error)})
        except Exception as error:
            if (message := disk_message(error, self.judge.job.out)) is not None:
                raise OutputError(message) from error
            kept = {"reason": f"{type(error).__name__}: {_one_line(error)}", "traceback": self._keep(running, error)}
            return result.model_copy(update=kept)
        return result.model_copy(update={"state": "done", "figures": figures})

    def _keep(self, running: Running, error: Exception) -> str:
        """Write the traceback of `error` beside the study; where it lies in the output folder."""
        text = f"{running.recipe}\n\n{''.join(traceback.format_exception(error))}"
        write_text(self.judge.job.out / _failure(running), text)
        return _failure(running)

    def _refusal(self, running: Running) -> str:
        """Why this recipe is not even tried; empty if it is."""
        if not running.recipe.steps:
            return "it holds no step"
        try:
            running.recipe.check(self.judge.job.target)
        except FeatherweightError as error:
            return str(error)
        return self.allowance.refusal(running.recipe)

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


def _failure(running: Running) -> str:
    return f"{FAILURES}/trial-{running.index + 1}.txt"


def _suggested(space: Space, skips: Skips, trial: optuna.Trial) -> Recipe:
    """What `space` suggests, with the layers that its steps leave alone."""
    recipe = space.suggest(trial)
    steps = [
        item.model_copy(update={"skip": skips[item.kind]}) if item.kind in skips else item for item in recipe.steps
    ]
    return Recipe(steps)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
