"""The search over combined recipes."""

from __future__ import annotations

import time as clock
from dataclasses import dataclass

from ..core.errors import FeatherweightError, OutputError
from ..core.run import Budget
from .allowance import Allowance
from .choose import excess, meets, value
from .clock import Clock
from .judge import Judge
from .output import disk_reason
from .plan import STORE, plan
from .space import Space, space_for
from .study import Running, Study, Trial

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
        space = self._space()
        proposal = plan(space, trials, self.budget)
        if self.allowance.limited and not (proposal and proposal.label.startswith(STORE)):
            space = self._space(self.allowance.epochs() if space.trains else None)
            proposal = plan(space, trials, self.budget)
        if proposal is None:
            return self.study.ask(space.suggest)
        return self.study.ask(space.suggest, proposal.params, proposal.label)

    def _space(self, epochs: float | None = None) -> Space:
        job, longest = self.judge.job, self.allowance.longest()
        return space_for(job.task, job.target, self.budget.objective, longest, epochs)

    def _over(self, trials: list[Trial]) -> bool:
        if self.trials is not None and len(trials) >= self.trials:
            return True
        known = {trial.digest for trial in trials[:-PATIENCE]}
        recent = trials[-PATIENCE:]
        if len(trials) > PATIENCE and all(trial.state == "refused" or trial.digest in known for trial in recent):
            self.judge.job.progress.say("nothing new is left to try")
            return True
        return self.allowance.over()

    # -- one trial -----------------------------------------------------------------------------------------------
    def _conduct(self, running: Running) -> Trial:
        """Refuse, reuse, or build, export and measure; what goes wrong with one recipe is kept with its reason."""
        recipe = running.recipe
        result = Trial(
            index=running.index, recipe=recipe.dump(), digest=recipe.digest(), state="failed", plan=running.plan
        )
        for earlier in self.study.finished():
            if earlier.digest == result.digest and earlier.state != "refused":
                found = {"state": earlier.state, "reason": earlier.reason, "figures": earlier.figures}
                return result.model_copy(update={**found, "copied": True})
        if reason := self._refusal(running):
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


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, FeatherweightError) else f"{type(error).__name__}: {text}"
