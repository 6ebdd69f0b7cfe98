"""The end of every run: the artifact, its figures on the test split, the verdict, and the output folder."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..core.axis import Axis, Bench
from ..core.diagnosis import Diagnosis
from ..core.files import replace_folder, write_json, write_text
from ..core.metric import Metric
from ..core.progress import Progress
from ..core.recipe import Recipe
from ..core.run import Budget, Candidate, Run
from ..core.target import Artifact
from ..core.task import Split, Task
from ..measure.inputs import batch_sizes
from ..measure.read import read
from ..model import skeleton
from .judge import ORIGINAL, Judge
from .output import RUN, work_folder
from .stages import layers, stages
from .verdict import idle_zeros, judge_bar, not_faster, slower, verdict

ARTIFACT, MODEL, REPORT = "artifact", "model", "report.html"
Axes = Sequence[Axis]


@dataclass
class Ending:
    """What a run knows when its recipe is settled, besides the recipe itself."""

    judge: Judge
    budget: Budget = field(default_factory=Budget)
    axes: Axes = ()
    candidates: list[Candidate] = field(default_factory=list)
    command: str = ""
    nearest: bool = False
    warnings: list[str] = field(default_factory=list)
    diagnosis: Diagnosis | None = None
    started: float = field(default_factory=time.perf_counter)


def finish(recipe: Recipe, end: Ending) -> Run:
    """Export the model of `recipe`, measure it on the test split and step by step, and write the output folder;
    run.json comes last.
    """
    judge, job = end.judge, end.judge.job
    model, records = job.build(recipe)
    job.progress.say("the compressed model: export")
    artifact = job.export(model, recipe, work_folder(job.out, ARTIFACT))
    steps, idle = stages(judge, recipe, artifact)
    split = report_split(job.task)
    bench = Bench(job.task, judge.original, artifact, split=split, seed=job.seed, progress=job.progress)
    readings = read(bench, end.axes)
    judged = judge_bar(readings, end.budget, job.task.metric, bar_batch(artifact))
    run = Run(
        task=job.task.source,
        task_name=job.task.name,
        target=artifact.manifest.target,
        budget=end.budget,
        seed=job.seed,
        command=end.command,
        verdict=verdict(readings, judged, job.task.metric, job.target.name, end.nearest),
        feasible=judged.met,
        artifact=str(job.out / ARTIFACT),
        recipe=recipe.dump(),
        metric=describe(job.task.metric),
        readings=readings,
        axes=[dumped(item) for item in end.axes],
        steps=records,
        stages=steps,
        layers=layers(job.task.original, model, judge.original, artifact),
        candidates=end.candidates,
        diagnosis=end.diagnosis,
        warnings=[
            *filter(None, [slower(readings), *_without_gain(artifact)]),
            *end.warnings,
            *idle,
            *(warning for record in records for warning in record.warnings),
            *_split_warnings(job.task, split),
        ],
        evidence=artifact.manifest.evidence,
        seconds=time.perf_counter() - end.started,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=artifact.manifest.versions,
    )
    _forget(job.out)
    replace_folder(artifact.folder, job.out / ARTIFACT)
    skeleton.save(model, job.out / MODEL)
    write_text(job.out / "recipe.yaml", yaml.safe_dump(recipe.dump(), sort_keys=False))
    write_run(run, job.out)
    return run


def _without_gain(artifact: Artifact) -> list[str]:
    """What of the artifact's stored forms brings no time, or nothing at all; empty texts where all does."""
    made = artifact.manifest
    return [not_faster(made.stored, made.evidence), idle_zeros(made.dense, made.target["name"])]


def write_run(run: Run, out: Path) -> None:
    """Write readings.json, and last of all run.json, which says that the folder is complete."""
    write_json(out / "readings.json", run.answer())
    write_text(out / RUN, run.model_dump_json(indent=1) + "\n")


def report_split(task: Task) -> Split:
    """The split that figures are reported on: test, or validation for a task that has none."""
    return "test" if task.has("test") else "validate"


def bar_batch(artifact: Artifact) -> int:
    """The batch size that a latency is judged at: 1, or the only one that the artifact takes."""
    return batch_sizes(artifact.manifest, (1,))[0]


def dumped(item: Axis) -> dict[str, Any]:
    """An axis as data: its name and its settings."""
    return {"name": item.name, **item.model_dump(mode="json")}


def describe(metric: Metric) -> dict[str, Any]:
    """A metric as data: name, unit, direction."""
    return {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better}


def reread(run: Run, task: Task, out: Path, axes: Axes, progress: Progress) -> Run:
    """`run` with the readings of `axes` taken anew, and the verdict and the warnings that follow from them."""
    split = report_split(task)
    bench = Bench(
        task, Artifact(out / ORIGINAL), Artifact(out / ARTIFACT), split=split, seed=run.seed, progress=progress
    )
    fresh = read(bench, axes)
    named = {item.name for item in axes}
    readings = [reading for reading in run.readings if reading.axis not in named] + fresh
    judged = judge_bar(readings, run.budget, task.metric, bar_batch(Artifact(out / ARTIFACT)))
    nearest = any(candidate.chosen and not candidate.feasible for candidate in run.candidates)
    was_slower = slower(run.readings)
    warnings = [*filter(None, [slower(readings)]), *(text for text in run.warnings if text != was_slower)]
    return run.model_copy(
        update={
            "readings": readings,
            "axes": [item for item in run.axes if item["name"] not in named] + [dumped(item) for item in axes],
            "verdict": verdict(readings, judged, task.metric, bench.original.manifest.target["name"], nearest),
            "feasible": judged.met,
            "warnings": warnings,
            "artifact": str(out / ARTIFACT),
        }
    )


def _split_warnings(task: Task, split: Split) -> list[str]:
    if split == "test":
        return []
    text = "the figures are those of the validation split, on which choices were made too"
    return [f"task {task.name} has no test data: {text}"]


def _forget(out: Path) -> None:
    """Take away what says that the folder is complete, before its parts are exchanged."""
    for name in (RUN, "readings.json", REPORT):
        (out / name).unlink(missing_ok=True)
