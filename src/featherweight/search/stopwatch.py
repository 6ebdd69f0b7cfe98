"""How long models take on the target: each is exported, loaded and timed there, before any figure is believed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from torch import nn

from ..core.progress import Progress
from ..core.target import Artifact, Target
from ..core.task import Task
from ..measure.inputs import free_inputs, sized
from ..measure.statistics import speedup
from ..measure.timing import Call, repeat

LOADS = 3  # of each artifact
SECONDS = 0.5  # of timing, for each model


@dataclass
class Stopwatch:
    """Seconds of one run of models on `target`, on one thread and `batch` real inputs; what steps see of a target.

    The models need not be right, only of the shape in question: how far their outputs are from anything is not asked.
    """

    target: Target
    task: Task
    batch: int = 1
    seed: int = 0
    progress: Progress = field(default_factory=Progress)

    @property
    def name(self) -> str:
        """What is measured on: the target with its settings, and the batch."""
        return json.dumps({"name": self.target.name, **self.target.model_dump(mode="json"), "batch": self.batch})

    def __call__(self, models: Sequence[nn.Module]) -> list[float]:
        """Seconds of each model; all are timed side by side, and what slowed the machine down cancels."""
        with tempfile.TemporaryDirectory() as folder:
            free = {name: self.task.free(name) for name in self.task.example}
            exported = [
                self.target.export(model, self.task.example, Path(folder) / str(place), free, bound=1.0)
                for place, model in enumerate(self.progress.track(models, "exporting to be timed", len(models)))
            ]
            return self._time(exported)

    def _time(self, artifacts: list[Artifact]) -> list[float]:
        def load() -> dict[str, Call]:
            return {str(place): self._call(artifact) for place, artifact in enumerate(artifacts)}

        samples = repeat(load, LOADS, SECONDS * len(artifacts), self.seed)
        first = samples["0"]
        median = float(np.median(np.concatenate([rows.ravel() for rows in first])))
        return [median / speedup(first, samples[str(place)], seed=self.seed).value for place in range(len(artifacts))]

    def _call(self, artifact: Artifact) -> Call:
        runner = artifact.open(threads=1)
        given = sized(runner.prepare(**artifact.example()), free_inputs(runner.manifest), self.batch)
        return partial(runner.session, **given)
