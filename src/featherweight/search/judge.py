"""A candidate is judged by its artifact: exported, run over the validation split, weighed, and timed beside the
original's.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from ..core.axis import Bench, axis
from ..core.context import Context
from ..core.errors import ArtifactError, TaskError
from ..core.files import whole_file
from ..core.machine import cores
from ..core.metric import Records
from ..core.progress import Progress
from ..core.recipe import Recipe
from ..core.record import StepRecord
from ..core.target import Artifact, Target
from ..core.task import Split, Task
from ..measure.accuracy import one_pass
from ..measure.inputs import free_inputs, sized
from ..measure.statistics import Estimate, speedup
from ..measure.timing import Call, repeat
from .choose import Figures
from .output import BASELINE, work_folder
from .stopwatch import Stopwatch
from .store import Store, build

Loads = list[np.ndarray]  # for each time that an artifact was loaded: seconds, rounds x runs

RESAMPLES = 400
TIMING_SECONDS = 1.0  # for two artifacts that are timed side by side
LOADS = 3  # of each artifact, when it is timed
ORIGINAL = "original"


@dataclass
class Job:
    """What one run is about: the task, the target, the seed, the output folder, and where models between steps are
    kept.
    """

    task: Task
    target: Target
    out: Path
    seed: int = 0
    progress: Progress = field(default_factory=Progress)
    store: Store = field(default_factory=Store)

    def context(self) -> Context:
        """A fresh context for the steps of one recipe."""
        return Context(
            self.task,
            seed=self.seed,
            progress=self.progress,
            width_multiple=self.target.width_multiple,
            stopwatch=Stopwatch(self.target, self.task, seed=self.seed, progress=self.progress),
        )

    def build(self, recipe: Recipe) -> tuple[nn.Module, list[StepRecord]]:
        """The model after `recipe`; prefixes that were computed before are read from the store."""
        return build(recipe, self.context(), self.store)

    def export(self, model: nn.Module, recipe: Recipe, folder: Path) -> Artifact:
        """Write the artifact of `model` to `folder`."""
        free = {name: self.task.free(name) for name in self.task.example}
        return self.target.export(model, self.task.example, folder, free, recipe=recipe.dump())

    @property
    def split(self) -> Split:
        """Where choices are made: the validation split, or test for a task that has no other (a single recipe chooses
        nothing).
        """
        return "validate" if self.task.has("validate") else "test"


@dataclass(frozen=True)
class Baseline:
    """The original on the split where choices are made: records, p50 of one input in milliseconds, seconds of the
    pass.
    """

    records: Records
    latency_ms: float
    seconds: float


class Judge:
    """Measures candidates against the original, whose artifact and whose records are made once and kept in the output
    folder.
    """

    def __init__(self, job: Job):
        self.job, self.task = job, job.task
        started = time.perf_counter()
        job.progress.say("the original: export and validation")
        self.original = self._original()
        baseline = self._baseline()
        self.records, self.latency_ms, self.validation_seconds = baseline.records, baseline.latency_ms, baseline.seconds
        self.accuracy = self.task.metric.reduce(self.records)
        self.seconds = time.perf_counter() - started

    def judge(self, recipe: Recipe, energy: bool = False) -> Figures:
        """Build `recipe`, export it to a folder that is removed afterwards, and measure it."""
        model, _ = self.job.build(recipe)
        folder = work_folder(self.job.out, "candidate")
        try:
            self.job.progress.say("export and validation")
            return self.figures(self.job.export(model, recipe, folder), energy)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def figures(self, artifact: Artifact, energy: bool = False) -> Figures:
        """What is measured of one artifact: accuracy and drop on the validation split, bytes, latency relative to the
        original.
        """
        metric, own = self.task.metric, self.validate(artifact)
        samples = self.time({ORIGINAL: self.original, "candidate": artifact})
        ratio = speedup(samples[ORIGINAL], samples["candidate"], seed=self.job.seed)
        accuracy = metric.reduce(own)
        return Figures(
            accuracy=accuracy,
            drop=metric.drop(self.accuracy, accuracy),
            drop_high=metric.drop_interval(self.records, own, RESAMPLES, self.job.seed)[1],
            bytes=artifact.bytes(),
            latency_ms=self.latency_ms / ratio.value,
            latency_noise=half_width(ratio),
            energy_mj=self._energy(artifact) if energy else None,
        )

    def time(self, artifacts: Mapping[str, Artifact]) -> dict[str, Loads]:
        """Seconds per run of each artifact on one input and one thread, interleaved, loaded afresh a few times."""
        return repeat(
            lambda: {name: one_input(item) for name, item in artifacts.items()},
            LOADS,
            TIMING_SECONDS * max(1, len(artifacts) / 2),
            self.job.seed,
        )

    def validate(self, artifact: Artifact) -> Records:
        """The metric's records of `artifact` on the split where choices are made."""
        name = ORIGINAL if artifact is self.original else "exported"
        return one_pass(self.task, {name: artifact}, self.job.split, self.job.progress, cores()).records[name]

    def _original(self) -> Artifact:
        folder = self.job.out / ORIGINAL
        if (folder / "manifest.json").is_file():
            artifact = Artifact(folder)
            try:
                artifact.verify()
                return artifact
            except ArtifactError as error:
                self.job.progress.say(f"the original is exported again ({error})")
        return self.job.export(self.task.fresh(), Recipe(), folder)

    def _baseline(self) -> Baseline:
        """What was measured of the original, once for all runs in the folder: every candidate is compared with the
        same figures.
        """
        path = self.job.out / BASELINE
        if path.is_file():
            with np.load(path, allow_pickle=False) as file:
                return Baseline(file["records"], float(file["latency_ms"]), float(file["seconds"]))
        started = time.perf_counter()
        found = self.validate(self.original)
        seconds = time.perf_counter() - started
        baseline = Baseline(found, p50(self.time({ORIGINAL: self.original})[ORIGINAL]), seconds)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, records=found, latency_ms=baseline.latency_ms, seconds=seconds)
        return baseline

    def _energy(self, artifact: Artifact) -> float:
        bench = Bench(self.task, self.original, artifact, split=self.job.split, seed=self.job.seed)
        for reading in axis("energy").read(bench):
            if reading.subject == "compressed" and reading.unit == "mJ":
                return reading.value
        raise TaskError("the axis energy gave no figure in mJ; choose another objective")


def one_input(artifact: Artifact) -> Call:
    """A call that runs `artifact` on one real input, on one thread."""
    runner = artifact.open(threads=1)
    given = sized(runner.prepare(**artifact.example()), free_inputs(runner.manifest), 1)
    return partial(runner.session, **given)


def p50(samples: Loads) -> float:
    """Median in milliseconds of timed runs in seconds."""
    return float(np.median(np.concatenate([load.ravel() for load in samples])) * 1e3)


def half_width(ratio: Estimate) -> float:
    """Half the width of an interval, relative to the value."""
    return (ratio.high - ratio.low) / 2 / ratio.value
