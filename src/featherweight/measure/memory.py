"""Memory: what a process needs that loads and runs the artifact and does nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Annotated

from pydantic import Field, PositiveInt

from featherweight.core.axis import Axis, Bench
from featherweight.core.errors import ArtifactError
from featherweight.core.reading import Reading, Subject
from featherweight.core.target import Artifact

from .inputs import batch_sizes, free_inputs
from .statistics import mean_estimate


class Memory(Axis, name="memory"):
    """Load and run each artifact in a fresh process of its own and read the resident memory of that process.

    Gives, in bytes, `floor_bytes` (the process with the runtime imported and the input in memory, before the artifact
    is loaded), `peak_bytes` (the most that was resident until the end of the runs) and `added_bytes` (the most over
    the floor: what the model itself costs, comparable across runtimes). The process imports numpy, pydantic, the
    words of this package and what the target's `load` needs, and no torch unless the target runs on it. Mean of
    `repeats` processes with Student's t interval; `n` counts processes.
    """

    batch: PositiveInt = 1
    threads: PositiveInt = 1
    repeats: Annotated[int, Field(ge=1, le=100)] = 3
    runs: PositiveInt = 5
    timeout: Annotated[float, Field(gt=0, le=86_400)] = 600.0

    def read(self, bench: Bench) -> list[Reading]:
        """Raises `ArtifactError` if a fresh process fails, is ended, or takes longer than `timeout` seconds."""
        taken: dict[Subject, list[dict[str, float]]] = {subject: [] for subject in bench.subjects}
        size = batch_sizes(bench.original.manifest, (self.batch,))[0]
        jobs = [(subject, artifact) for _ in range(self.repeats) for subject, artifact in bench.subjects.items()]
        for subject, artifact in bench.progress.track(jobs, "memory in fresh processes", len(jobs)):
            taken[subject].append(weigh(artifact, size, self.threads, self.runs, self.timeout))
        return [
            self._reading(bench, subject, name, [weight[name] for weight in weights], size)
            for subject, weights in taken.items()
            for name in ("peak_bytes", "added_bytes", "floor_bytes")
        ]

    def _reading(self, bench: Bench, subject: Subject, name: str, values: list[float], size: int) -> Reading:
        value, low, high = mean_estimate(values)
        spread = {"low": max(0.0, low), "high": high} if len(values) > 1 else {}
        where = {"batch": size, "threads": self.threads, "runs": self.runs}
        return bench.reading(subject, "memory", name, value, "bytes", n=len(values), conditions=where, **spread)


def weigh(
    artifact: Artifact, size: int = 1, threads: int = 1, runs: int = 5, timeout: float = 600.0
) -> dict[str, float]:
    """`floor_bytes`, `peak_bytes`, `added_bytes` of a fresh process that runs `artifact` `runs` times at batch `size`.

    Raises `ArtifactError` if the process fails, with its last words.
    """
    artifact.verify()
    job = {
        "module": type(artifact.target).__module__,
        "class": type(artifact.target).__qualname__,
        "target": artifact.manifest.target,
        "file": str(artifact.file.resolve()),
        "example": str((artifact.folder / "example.npz").resolve()),
        "free": sorted(free_inputs(artifact.manifest)),
        "size": size,
        "threads": threads,
        "runs": runs,
    }
    command = [sys.executable, "-m", "featherweight.measure.resident", json.dumps(job)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(
            f"{artifact.folder} did not load and run within {timeout:g} s in a fresh process"
        ) from error
    if done.returncode != 0:
        raise ArtifactError(f"{artifact.folder} fails in a fresh process: {_last_words(done.returncode, done.stderr)}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _last_words(code: int, stderr: str) -> str:
    if code < 0:
        return f"it was ended by signal {-code}" + (", perhaps for lack of memory" if code == -9 else "")
    lines = [line for line in stderr.splitlines() if line.strip()]
    return lines[-1].strip() if lines else f"exit code {code}"
