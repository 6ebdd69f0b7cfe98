"""The three ways to fill an output folder: apply one recipe, search for one, measure again."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core.axis import Axis
from ..core.errors import ArtifactError, TaskError
from ..core.progress import Progress
from ..core.recipe import Recipe
from ..core.run import Budget, Run
from ..core.step import one_line
from ..core.target import Target
from ..core.task import Task, find_task
from ..measure.read import select
from .clock import Clock
from .compress import Search
from .finish import REPORT, Axes, Ending, dumped, finish, reread, write_run
from .judge import Job, Judge
from .output import RUN, STUDY, claim, finished, hold
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
    axes: Sequence[str | Axis] | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Run:
    """Apply one recipe to the task's model, export, measure, and write `out` whole.

    An `out` where this very job was finished before is read, and of `axes` (None: all that there are) only those are
    measured that were not, or not so; an `out` where it was stopped is gone on with. Raises `RecipeError` or
    `NotCarried` before any work if the recipe cannot run, `OutputError` about the folder, and what a step or the export
    raises.
    """
    recipe.check(target)
    chosen = select(axes)
    task.check()
    progress = progress or Progress()
    with claim(out, _identity("apply", task, target, seed, recipe=recipe.digest())):
        if finished(out):
            progress.say(f"{out} holds this run, finished; nothing is done again")
            return _completed(read_run(out), task, out, chosen, progress)
        started = clock.perf_counter()
        judge = _judge(task, target, out, seed, progress)
        return finish(recipe, Ending(judge, axes=chosen, command=command, started=started))


def compress(
    task: Task,
    target: Target,
    budget: Budget,
    out: Path,
    *,
    time: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    axes: Sequence[str | Axis] | None = None,
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
    chosen, progress = select(axes), progress or Progress()
    limit = DEFAULT_TIME if time is None and trials is None else time
    started = clock.perf_counter()
    task.check()
    with claim(out, _identity("compress", task, target, seed, budget=budget.model_dump(mode="json"))):
        study = Study(out / STUDY, seed)
        if finished(out) and not _more(study, limit, trials):
            progress.say(f"{out} holds this run, finished; give more time or trials to go on")
            return _completed(read_run(out), task, out, chosen, progress)
        watch = Clock(limit, spent=float(study.kept("spent", 0.0)), started=started)
        judge = _judge(task, target, out, seed, progress)
        search = Search(judge, study, budget, watch, trials)
        search.run()
        settled = settle(search)
        end = Ending(judge, budget, chosen, settled.candidates, command, settled.nearest, list(search.warnings()))
        end.started, end.diagnosis = started - watch.spent, search.diagnosis()
        run = finish(settled.recipe, end)
        study.keep("limits", [limit, trials])
        return run


def measure(
    out: Path,
    axes: Sequence[str | Axis] | None = None,
    progress: Progress | None = None,
    task: Task | None = None,
) -> Run:
    """Read `axes` of the artifacts in `out` again, on this machine, and write the readings, the verdict and run.json
    anew.

    The task is found by the name under which the run was made, or given. Raises `ArtifactError` if `out` holds no
    finished run or a damaged one, `TaskError` if the task cannot be found, `OutputError` if another process works in
    `out`.
    """
    run, chosen = read_run(out), select(axes)
    if task is None:
        if not run.task:
            raise TaskError(f"the run in {out} was made from a Task object without a name to find it by; give task=")
        task = find_task(run.task)
    with hold(out):
        return _measured(read_run(out), task, out, chosen, progress or Progress())


def _completed(run: Run, task: Task, out: Path, axes: Axes, progress: Progress) -> Run:
    """`run` with those of `axes` measured that it lacks, or holds with other settings."""
    lacking = [item for item in axes if dumped(item) not in run.axes]
    if not lacking:
        return run
    progress.say(f"only this is measured: {', '.join(item.name for item in lacking)}")
    return _measured(run, task, out, lacking, progress)


def _measured(run: Run, task: Task, out: Path, axes: Axes, progress: Progress) -> Run:
    again = reread(run, task, out, axes, progress)
    (out / REPORT).unlink(missing_ok=True)  # it shows the figures of before
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


def _more(study: Study, limit: float | None, trials: int | None) -> bool:
    """Whether a finished search is asked for more than it was given."""
    was_limit, was_trials = study.kept("limits", [None, None])
    return _raised(limit, was_limit) or _raised(trials, was_trials)


def _raised(asked: float | None, was: float | None) -> bool:
    return asked is not None and (was is None or asked > was)
