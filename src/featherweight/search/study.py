"""The trials of a search, in a database that survives the process."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from ..core.errors import OutputError
from ..core.files import disk_message, whole_file
from ..core.recipe import Recipe
from .choose import Figures
from .clock import epochs_of
from .space import Params

NAME = "featherweight"
STARTUP = 12  # trials before the sampler models what it has seen
ASKED, RESULT = "asked", "result"


class Trial(BaseModel):
    """One recipe that was tried: its place in the search, the recipe, how it ended, and what was measured.

    `copied`: of an earlier trial of the same recipe. `limit` is the time (seconds) that the whole run had when the
    recipe was proposed. `traceback` names the file in the output folder that holds it, where the trial failed for a
    reason that may not be the recipe's: such a trial is tried again.
    """

    model_config = ConfigDict(extra="forbid")
    index: int
    recipe: dict[str, Any]
    digest: str
    state: Literal["done", "refused", "failed"]
    reason: str = ""
    figures: Figures | None = None
    seconds: float = 0.0
    copied: bool = False
    plan: str = ""
    limit: float | None = None
    traceback: str = ""

    @property
    def trains(self) -> bool:
        """Whether a step of the recipe trains."""
        return any(epochs_of(item) for item in Recipe(self.recipe["steps"]).steps)


class Running(BaseModel):
    """A trial that is being worked on: its number in the database, its place in the search, its recipe, who proposed
    it, and how much time the run had then.
    """

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)
    number: int
    index: int
    recipe: Recipe
    plan: str = ""
    limit: float | None = None


class Study:
    """Optuna's trials by ask and tell, in an SQLite file that appears whole.

    What is proposed depends only on the seed and on the trials that are finished: the sampler is made anew for every
    trial, with a seed derived from `seed` and the trial's index. A trial's recipe is stored as soon as it is known,
    so that a killed trial is run again as it was; one that was killed before that is dropped, and its index is given
    out again.
    """

    def __init__(self, path: Path, seed: int):
        if not path.is_file():
            with whole_file(path) as temporary:
                _close(_open(temporary))
        self.study, self.seed = _open(path), seed

    def finished(self) -> list[Trial]:
        """Every trial that ended, in the order of the search; of one that was tried again, the last try."""
        found: dict[int, Trial] = {}
        for trial in self._trials():
            if trial.state.is_finished() and RESULT in trial.user_attrs:
                result = Trial.model_validate(trial.user_attrs[RESULT])
                found[result.index] = result
        return [found[index] for index in sorted(found)]

    def note(self, name: str, make: Callable[[], Any]) -> Any:
        """The value kept under `name`; the first time it is made and kept."""
        if name not in self.study.user_attrs:
            self.study.set_user_attr(name, make())
        return self.study.user_attrs[name]

    def keep(self, name: str, value: Any) -> None:
        """Keep `value` (JSON) under `name`, in place of what was there."""
        self.study.set_user_attr(name, value)

    def kept(self, name: str, otherwise: Any) -> Any:
        """What is kept under `name`, else `otherwise`."""
        return self.study.user_attrs.get(name, otherwise)

    def left_over(self) -> Running | None:
        """The trial that a killed run was working on, to be run again; trials that had no recipe yet are dropped."""
        found = None
        for trial in self._trials(TrialState.RUNNING):
            if ASKED in trial.user_attrs and found is None:
                asked = trial.user_attrs[ASKED]
                found = _running(trial.number, asked)
            else:
                self.study.tell(trial.number, state=TrialState.FAIL)
        return found

    def ask(
        self,
        suggest: Callable[[optuna.Trial], Recipe],
        fixed: Params | None = None,
        plan: str = "",
        limit: float | None = None,
    ) -> Running:
        """A new trial with the recipe that `suggest` makes of it; `fixed` parameters are given instead of sampled."""
        index = len(self.finished())
        self.study.sampler = _sampler(self.seed, index)
        if fixed is not None and not self._trials(TrialState.WAITING):
            self.study.enqueue_trial(fixed)
        trial = self.study.ask()
        recipe = suggest(trial)
        asked = {"index": index, "plan": plan, "recipe": recipe.dump(), "limit": limit}
        trial.set_user_attr(ASKED, asked)
        return _running(trial.number, asked)

    def again(self, index: int) -> Running:
        """The trial at this place of the search once more: the same parameters and recipe, in the same place."""
        old = next(trial for trial in self._trials() if trial.user_attrs.get(ASKED, {}).get("index") == index)
        asked = old.user_attrs[ASKED]
        self.study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.RUNNING,
                params=old.params,
                distributions=old.distributions,
                user_attrs={ASKED: asked},
            )
        )
        return _running(self._trials()[-1].number, asked)

    def tell(
        self,
        running: Running,
        result: Trial,
        value: float | None = None,
        constraints: Mapping[str, float] | None = None,
    ) -> None:
        """End a trial: with its value and constraints if it was measured; else it is kept with its reason and the
        sampler never sees it.
        """
        trial = optuna.Trial(self.study, self._id(running.number))
        trial.set_user_attr(RESULT, result.model_dump(mode="json"))
        if value is None:
            self.study.tell(running.number, state=TrialState.FAIL)
            return
        for name, amount in (constraints or {}).items():
            if name not in trial.constraints:
                trial.set_constraint(name, amount)
        self.study.tell(running.number, value)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _id(self, number: int) -> int:
        return next(trial._trial_id for trial in self._trials() if trial.number == number)


def _running(number: int, asked: dict[str, Any]) -> Running:
    recipe = Recipe(asked["recipe"]["steps"])
    return Running(number=number, index=asked["index"], recipe=recipe, plan=asked["plan"], limit=asked["limit"])


def _open(path: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    url = URL.create("sqlite", database=str(path)).render_as_string(hide_password=False)
    try:
        return optuna.create_study(storage=optuna.storages.RDBStorage(url), study_name=NAME, load_if_exists=True)
    except (RuntimeError, optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        if disk_message(error, path) is not None:
            raise
        reason = " ".join(str(error).split())
        raise OutputError(f"{path} is not the database of a search ({reason[:120]}); choose another folder") from error


def _close(study: optuna.Study) -> None:
    """Let go of the file, so that it can be moved."""
    backend: Any = getattr(study._storage, "_backend", study._storage)
    backend.remove_session()
    backend.engine.dispose()


def _sampler(seed: int, index: int) -> optuna.samplers.BaseSampler:
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return optuna.samplers.TPESampler(
        seed=int.from_bytes(digest[:4], "big"),
        n_startup_trials=STARTUP,
        multivariate=True,
        group=True,
    )
