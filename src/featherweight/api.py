"""The whole of featherweight from Python: compress, apply, measure, save, load."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.axis import Axis
from .core.diagnosis import Diagnosis
from .core.errors import FeatherweightError, TaskError
from .core.files import write_json
from .core.progress import Progress
from .core.reading import Reading
from .core.recipe import Recipe
from .core.run import Budget, Run
from .core.soft import encodings, fold
from .core.target import Artifact, Target
from .core.target import target as find_target
from .core.task import Split, Task, find_task
from .model import adapter_files, coded, skeleton
from .model.encoded import lean, standalone
from .report.build import build as build_report
from .report.build import build_diagnosis
from .search import pipeline
from .search.diagnose import diagnose as examine
from .search.diagnose import parse_method
from .search.finish import ARTIFACT, MODEL, REPORT
from .search.output import RUN, fresh

if TYPE_CHECKING:
    from torch import nn

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


class Result:
    """What a run found out and made: its model, artifact, recipe, readings and verdict, and the folder that holds them.

    `folder` is where everything lies. If it was not named, it is a temporary one that lives as long as this object.
    """

    def __init__(
        self, run: Run, folder: Path, task: Task | None = None, keep: tempfile.TemporaryDirectory[str] | None = None
    ):
        self.run, self.folder, self._task, self._keep = run, folder, task, keep

    @cached_property
    def model(self) -> nn.Module:
        """The compressed model in evaluation mode, rebuilt from the folder; it can be trained and compressed again.

        Raises `TaskError` if the task cannot be found again, `ArtifactError` if the folder is damaged.
        """
        return skeleton.load(self.folder / MODEL, like=self.recipe.architecture(self.task))

    @property
    def task(self) -> Task:
        """The task of the run; found by its name if the result was read from a folder."""
        if self._task is None:
            if not self.run.task:
                raise TaskError(f"the run in {self.folder} was made from a Task object without a name to find it by")
            self._task = find_task(self.run.task)
        return self._task

    @property
    def artifact(self) -> Artifact:
        """What is to be deployed; raises `ArtifactError` if it is missing or its manifest is damaged."""
        return Artifact(self.folder / ARTIFACT)

    @property
    def recipe(self) -> Recipe:
        """The recipe that made the model."""
        return Recipe.parse(self.run.recipe)

    @property
    def readings(self) -> list[Reading]:
        """Every figure that was read off the artifacts."""
        return self.run.readings

    @property
    def verdict(self) -> str:
        """What was gained and lost, in one sentence."""
        return self.run.verdict

    @property
    def feasible(self) -> bool:
        """Whether the artifact meets the bar by its figures on the test split."""
        return self.run.feasible

    def report(self, path: str | Path | None = None) -> Path:
        """Write the report to `path` (by default `report.html` in the folder) and return where it is."""
        return build_report(self.run, Path(path) if path is not None else self.folder / REPORT)

    def __repr__(self) -> str:
        return f"Result({self.verdict!r}, folder={str(self.folder)!r})"


def compress(
    task: Task | str,
    target: Target | str = "onnxruntime",
    budget: Budget | None = None,
    out: str | Path | None = None,
    time: float | str | None = None,
    trials: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Search for the recipe that makes the task's model best within `budget`, export it, measure it, and write a
    report.

    `task` is a `Task` or names one ("file.py:function", "package.module:function", "zoo:NAME"). `time` (seconds, or
    text such as "10m") bounds the whole run, `trials` the number of recipes; without either it is 10 minutes. `out`
    names the output folder: new, empty, or one that an earlier run of the same job left, which is gone on with; None
    takes a temporary folder that lives as long as the `Result`. If nothing meets the bar the result is what came
    nearest, with `feasible` False. Raises `FeatherweightError` with one line that says what to do.
    """
    task, target, budget = find_task(_located(task)), _target(target), budget or Budget()
    seconds = parse_time(time) if time is not None else None
    if trials is not None and trials < 1:
        raise FeatherweightError(f"trials={trials}: at least one recipe must be tried")
    limits = {"time": seconds, "trials": trials}

    def work(folder: Path) -> Run:
        command = command_for("compress", task, target, folder, seed, budget=budget, limits=limits)
        return pipeline.compress(
            task, target, budget, folder, time=seconds, trials=trials, seed=seed, progress=progress, command=command
        )

    return _result(work, task, out)


def apply(
    task: Task | str,
    recipe: Recipe | str | Path,
    target: Target | str = "onnxruntime",
    out: str | Path | None = None,
    seed: int = 0,
    axes: Sequence[str | Axis] | None = None,
    progress: Progress | None = None,
) -> Result:
    """Apply one recipe to the task's model, export it, measure it, and write a report; no search.

    `recipe` is a `Recipe`, the path of a YAML file, or the name of one that ships with the package. `axes` (names or
    values) says what is measured: by default everything that can be. For `task` and `out` see `compress`. Raises
    `FeatherweightError` with one line that says what to do.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)
    task, target = find_task(_located(task)), _target(target)

    def work(folder: Path) -> Run:
        command = command_for("apply", task, target, folder, seed, recipe=folder / "recipe.yaml", axes=axes)
        return pipeline.apply(task, recipe, target, folder, seed=seed, axes=axes, progress=progress, command=command)

    return _result(work, task, out)


def measure(
    folder: str | Path,
    axes: Sequence[str | Axis] | None = None,
    progress: Progress | None = None,
    task: Task | None = None,
) -> Result:
    """Measure the artifacts in the folder of an earlier run again, on this machine; rewrite its readings, verdict and
    report.

    `task` is needed only for a run that was made from a `Task` object. Raises `ArtifactError` for a folder that holds
    no finished run.
    """
    folder = Path(folder)
    run = pipeline.measure(folder, axes, progress, task)
    result = Result(run, folder, task)
    result.report()
    return result


def diagnose(
    task: Task | str,
    method: Recipe | str = "quantize.static",
    out: str | Path | None = None,
    split: Split = "validate",
    inputs: int = 512,
    max_drop: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Rank the layers by what compressing each alone costs, in the task's metric and in signal to noise.

    `method` is the name of a method, a recipe (its last step is diagnosed, after those before it), or a YAML file.
    `inputs` of `split` are looked at; `max_drop` (the metric's unit) is the bar that the suggested `skip` must meet.
    `out` names a new or empty folder for `diagnosis.json` and `diagnosis.html`. Raises `FeatherweightError` with one
    line that says what to do.
    """
    recipe = method if isinstance(method, Recipe) else parse_method(method)
    if inputs < 1:
        raise FeatherweightError(f"inputs={inputs}: at least one input must be looked at")
    task = find_task(_located(task))
    if out is None:
        return examine(task, recipe, split, inputs, max_drop, seed, progress)
    with fresh(Path(out)) as folder:
        found = examine(task, recipe, split, inputs, max_drop, seed, progress)
        write_json(folder / "diagnosis.json", found.model_dump(mode="json"))
        build_diagnosis(found, folder / "diagnosis.html")
    return found


def save(model: nn.Module, folder: str | Path) -> None:
    """Write any compressed model to `folder`, structure and tensors, without pickle; the folder appears whole or not
    at all.
    """
    skeleton.save(model, folder)


def load(folder: str | Path, like: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """The model that `save` wrote, with equal outputs. `like` is the original model or a function that makes it;
    models of known layers need none.
    """
    return skeleton.load(folder, like)


def save_adapter(model: nn.Module, file: str | Path) -> Path:
    """Write the adapters of `model` (those kept beside their layers) to one small file with the digest of their base.

    `load_adapter` puts them on another copy of that base, and a `Runner` of an artifact of that base runs with them
    after `use(file)`. Raises `TaskError` for a model without adapters.
    """
    return adapter_files.save_adapter(model, file)


def load_adapter(model: nn.Module, file: str | Path) -> nn.Module:
    """A copy of `model` with the adapters in `file` in place of its own. Raises `ArtifactError` if they belong to
    another base.
    """
    return adapter_files.load_adapter(model, file)


def pack(source: nn.Module | str | Path, file: str | Path, like: skeleton.Like = None) -> Path:
    """Write a model to one coded checkpoint, near its entropy, from which `unpack` gives it back with equal outputs.

    `source` is a model, a folder that `save` wrote, or the folder of a finished run. Weights that are held softly are
    stored as their encodings alone. A run's model becomes a captured graph, so that the file needs no class of the
    user's; a saved model of own classes needs `like` here (see `load`) and when the unpacked folder is loaded. Raises
    `ArtifactError` for a damaged folder, `OutputError` where the file cannot be written.
    """
    coded.write(Path(file), *skeleton.skeleton(_packable(source, like)))
    return Path(file)


def _packable(source: nn.Module | str | Path, like: skeleton.Like) -> nn.Module:
    """The model to pack."""
    if not isinstance(source, str | Path):
        return lean(source)
    folder = Path(source)
    if not (folder / RUN).is_file():
        return lean(skeleton.load(folder, like))
    result = Result(pipeline.read_run(folder), folder)
    model, task = result.model, result.task
    free = {name: task.free(name) for name in task.example}
    return standalone(fold(model), encodings(model), task.example, free)


def unpack(file: str | Path, folder: str | Path) -> Path:
    """Write the model in a coded checkpoint to `folder`, as `save` does, so that `load` gives it back.

    Raises `ArtifactError`, which names the tensor, for a file that is cut short or altered; nothing is written then.
    """
    reader = coded.Reader(file)
    tensors = dict(reader.tensors())
    skeleton.write(coded.digested(reader.page, tensors), tensors, folder)
    return Path(folder)


def parse_time(text: float | str) -> float:
    """Seconds from a number, or from text such as "90s", "10m", "1h30m". Raises `FeatherweightError` on anything
    else.
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([smh]?)", str(text))
    total = sum(float(amount) * UNITS[unit or "s"] for amount, unit in parts)
    if "".join(amount + unit for amount, unit in parts) != str(text).strip() or not total > 0:
        raise FeatherweightError(f"{text!r} is no time; write 90s, 10m or 1h30m")
    return total


def _result(work: Callable[[Path], Run], task: Task, out: str | Path | None) -> Result:
    """Do the work in the named folder, or in a temporary one that the result keeps."""
    keep = tempfile.TemporaryDirectory(prefix="featherweight-") if out is None else None
    folder = Path(keep.name if keep is not None else str(out))
    result = Result(work(folder), folder, task, keep)
    if not (folder / REPORT).exists():
        result.report()
    return result


def _target(target: Target | str) -> Target:
    return target if isinstance(target, Target) else find_target(target)


def _located(task: Task | str) -> Task | str:
    """A task's file by its full path, so that it is found again from anywhere."""
    if isinstance(task, str):
        where, colon, name = task.rpartition(":")
        if where.endswith(".py") and Path(where).is_file():
            return f"{Path(where).resolve()}{colon}{name}"
    return task


def command_for(
    verb: str,
    task: Task,
    target: Target,
    folder: Path,
    seed: int,
    *,
    recipe: Path | None = None,
    budget: Budget | None = None,
    limits: Mapping[str, float | None] | None = None,
    axes: Sequence[str | Axis] | None = None,
) -> str:
    """What does this run again: the command, or the call in Python where the command line has no words for it (a task
    that is an object without a name to find it by, a target or an axis with settings of its own).
    """
    chosen = None if axes is None else [_spelled("axis", item) for item in axes]
    runtime, bars = _spelled("target", target), {} if budget is None else _given(budget.model_dump())
    rest = bars | _given(limits or {})
    if task.source and _plain(runtime) and all(map(_plain, chosen or [])):
        words = ["featherweight", verb, *([str(recipe)] if recipe else []), task.source, "--target", target.name]
        words += [word for name, value in rest.items() for word in (f"--{name.replace('_', '-')}", f"{value}")]
        words += [] if axes is None else ["--axes", ",".join(_name(item) for item in axes)]
        return shlex.join([*words, "--seed", str(seed), "--out", str(folder)])
    given = [repr(task.source) if task.source else "task", *([repr(str(recipe))] if recipe else []), runtime]
    given += [f"budget=featherweight.Budget({_keywords(bars)})"] if budget else []
    given += [_keywords(_given(limits))] if limits and _given(limits) else []
    given += [] if chosen is None else [f"axes=[{', '.join(chosen)}]"]
    call = f"featherweight.{verb}({', '.join(given)}, seed={seed}, out={str(folder)!r})"
    return call if task.source else f"{call}  # task: the Task named {task.name!r}"


def _spelled(kind: str, item: str | Target | Axis) -> str:
    """A target or an axis in Python: its name, or what makes it where it has settings of its own."""
    settings = {} if isinstance(item, str) else item.model_dump(mode="json", exclude_defaults=True)
    return (
        f"featherweight.core.{kind}.{kind}({_name(item)!r}, {_keywords(settings)})" if settings else repr(_name(item))
    )


def _plain(spelled: str) -> bool:
    return not spelled.endswith(")")


def _name(item: str | Target | Axis) -> str:
    return item if isinstance(item, str) else item.name


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _keywords(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
