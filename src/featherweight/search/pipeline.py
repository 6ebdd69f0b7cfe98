"""The three ways to fill an output folder: apply one recipe, search for one, measure again."""

from __future__ import annotations

import time as clock
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core import registry
from ..core.axis import Axis, axis
from ..core.errors import ArtifactError, TaskError
from ..core.progress import Progress
from ..core.recipe import Recipe
from ..core.run import Budget, Run
from ..core.step import one_line
from ..core.target import Target
from ..core.task import Task, find_task
from ..measure.read import DEFAULT
from .clock import Clock
from .compress import Search
from .finish import Axes, Ending, finish, reread, write_run
from .judge import Job, Judge
from .output import RUN, STUDY, claim, disk_guard, finished
from .settle import settle
from .store import Store
from .study import Study

DEFAULT_TIME = 600.0  # seconds, where neither time nor trials are given


def apply(
    task: Task,
    recipe: Recipe,
    target: Target,
    out: Path,
    seed: int = 0,
    axes: Axes | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Run:
    """Apply one recipe to the task's model, export, measure, and write `out` whole.

    An `out` where this very job was finished before is read, one where it was stopped is gone on with. Raises
    `RecipeError` or `NotCarried` before any work if the recipe cannot run, `OutputError` about the folder, and what a
    step or the export raises.
    """
    recipe.check(target)
    axes = _axes(axes)
    task.check()
    progress = progress or Progress()
    with claim(out, _identity("apply", task, target, seed, recipe=recipe.digest())):
        if finished(out):
            progress.say(f"{out} holds this run, finished; nothing is done again")
            return read_run(out)
        started = clock.perf_counter()
        judge = _judge(task, target, out, seed, progress)
        return finish(recipe, Ending(judge, axes=axes, command=command, started=started))


def compress(
    task: Task,
    target: Target,
    budget: Budget,
    out: Path,
    *,
    time: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    axes: Axes | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Run:
    """Search for the recipe that meets `budget` best, within `time` seconds and `trials` recipes, and write `out`.

    Without either limit the time is 10 minutes; it bounds the whole run, final measurements included, and counts what
    an interrupted run in the same folder used. Choices are made on the validation split; figures are reported on the
    test split. If nothing meets the bar, what came nearest is written, and the run says that it is not feasible.
    Raises `TaskError`, `OutputError`, and `Infeasible` if no recipe ran at all.
    """
    if not task.has("validate"):
        raise TaskError(
            f"task {task.name} has no 'validate' data, on which the search must choose; give some that are not in test"
        )
    axes, progress = _axes(axes), progress or Progress()
    limit = DEFAULT_TIME if time is None and trials is None else time
    started = clock.perf_counter()
    task.check()
    with claim(out, _identity("compress", task, target, seed, budget=budget.model_dump(mode="json"))):
        study = Study(out / STUDY, seed)
        if finished(out) and not _more(study, limit, trials):
            progress.say(f"{out} holds this run, finished; give more time or trials to go on")
            return read_run(out)
        watch = Clock(limit, spent=float(study.kept("spent", 0.0)), started=started)
        judge = _judge(task, target, out, seed, progress)
        search = Search(judge, study, budget, watch, trials)
        search.run()
        settled = settle(search)
        end = Ending(judge, budget, axes, settled.candidates, command, settled.nearest, started=started - watch.spent)
        run = finish(settled.recipe, end)
        study.keep("limits", [limit, trials])
        return run


def measure(out: Path, axes: Axes | None = None, progress: Progress | None = None, task: Task | None = None) -> Run:
    """Read `axes` of the artifacts in `out` again, on this machine, and write the readings, the verdict and run.json
    anew.

    The task is found by the name under which the run was made, or given. Raises `ArtifactError` if `out` holds no
    finished run or a damaged one, `TaskError` if the task cannot be found.
    """
    run = read_run(out)
    if task is None:
        if not run.task:
            raise TaskError(f"the run in {out} was made from a Task object without a name to find it by; give task=")
        task = find_task(run.task)
    again = reread(run, task, out, _axes(axes), progress or Progress())
    with disk_guard(out):
        write_run(again, out)
    return again


def read_run(out: Path) -> Run:
    """The record of the finished run in `out`; raises `ArtifactError` if there is none or it cannot be read."""
    path = out / RUN
    if not path.is_file():
        raise ArtifactError(
            f"{out} holds no finished run (no {RUN}); run compress, apply or demo with --out {out} first"
        )
    try:
        return Run.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        reason = one_line(error) if isinstance(error, ValidationError) else str(error)
        raise ArtifactError(f"{path} cannot be read: {reason}") from error


def _judge(task: Task, target: Target, out: Path, seed: int, progress: Progress) -> Judge:
    return Judge(Job(task, target, out, seed, progress, Store(progress=progress)))


def _identity(kind: str, task: Task, target: Target, seed: int, **rest: Any) -> dict[str, Any]:
    """What makes two runs the same job: what is gone on with must be equal in all of it."""
    return {
        "format": 1,
        "run": kind,
        "task": task.digest,
        "target": {"name": target.name, **target.model_dump(mode="json")},
        "seed": seed,
        "featherweight": version("featherweight"),
        **rest,
    }


def _axes(axes: Axes | None) -> list[Axis]:
    """The axes by name or as they are, checked before any work starts; by default all that there are."""
    if axes is None:
        registry.load("axes")
        axes = [*DEFAULT, *sorted(set(Axis.kinds) - set(DEFAULT))]
    return [axis(item) if isinstance(item, str) else item for item in axes]


def _more(study: Study, limit: float | None, trials: int | None) -> bool:
    """Whether a finished search is asked for more than it was given."""
    was_limit, was_trials = study.kept("limits", [None, None])
    return _raised(limit, was_limit) or _raised(trials, was_trials)


def _raised(asked: float | None, was: float | None) -> bool:
    return asked is not None and (was is None or asked > was)
