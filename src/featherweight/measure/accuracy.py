"""Accuracy: the task's own metric, read off the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import numpy as np
from pydantic import Field, PositiveInt

from featherweight.core.axis import Axis, Bench
from featherweight.core.errors import NotFinite, TaskError
from featherweight.core.machine import cores
from featherweight.core.metric import Metric, Records
from featherweight.core.progress import Progress
from featherweight.core.reading import Reading, Subject
from featherweight.core.target import Artifact
from featherweight.core.task import Split, Task

from .inputs import batch_sizes
from .statistics import share_estimate

Name = TypeVar("Name", bound=str)

_MOST_DRAWN = 50_000_000  # records drawn for one interval: beyond, fewer resamples are taken
_FEWEST = 200  # resamples below which the ends of a percentile interval would jump about


class Accuracy(Axis, name="accuracy"):
    """Run every artifact once over the whole split and reduce the task's metric, with bootstrap intervals over inputs.

    Gives the metric under its own name and unit for each artifact and, for the compressed one, `drop` (how much worse
    it is than the original, in the metric's unit; negative if it is better; the interval is paired, input by input)
    and `agreement` (the share of inputs on which both give the same answer, in percent, as the metric's `agree` sees
    it; Wilson interval). `n` counts inputs. `threads` defaults to all processors that this process may use.
    """

    resamples: Annotated[int, Field(ge=_FEWEST, le=100_000)] = 1000
    threads: PositiveInt | None = None

    def read(self, bench: Bench) -> list[Reading]:
        """Raises `NotFinite` if an output or a record is NaN or infinite, `TaskError` if the split has no data."""
        passed = one_pass(bench.task, bench.subjects, bench.split, bench.progress, self.threads or cores())
        metric, found = bench.task.metric, []
        rest: dict[str, Any] = {"split": bench.split, "conditions": {"batch": passed.batch}}
        records = passed.records
        for subject, own in records.items():
            low, high = metric.interval(own, self._resamples(own), bench.seed)
            rest |= {"n": len(own)}
            found.append(_reading(bench, subject, metric.name, metric.reduce(own), metric.unit, low, high, rest))
        if "compressed" in records:
            found.append(self._drop(bench, metric, records["original"], records["compressed"], rest))
            value, low, high = (100 * part for part in share_estimate(np.concatenate(passed.agreement)))
            found.append(_reading(bench, "compressed", "agreement", value, "%", low, high, rest))
        return found

    def _drop(
        self, bench: Bench, metric: Metric, original: Records, compressed: Records, rest: dict[str, Any]
    ) -> Reading:
        value = metric.drop(metric.reduce(original), metric.reduce(compressed))
        low, high = metric.drop_interval(original, compressed, self._resamples(original), bench.seed)
        return _reading(bench, "compressed", "drop", value, metric.unit, low, high, rest)

    def _resamples(self, records: Records) -> int:
        return max(_FEWEST, min(self.resamples, _MOST_DRAWN // len(records)))


def _reading(
    bench: Bench, subject: Subject, name: str, value: float, unit: str, low: float, high: float, rest: dict[str, Any]
) -> Reading:
    if not np.isfinite([value, low, high]).all():
        raise NotFinite(
            f"{name} of the {subject} artifact on the split {bench.split!r} is not finite; check the metric"
        )
    return bench.reading(subject, "accuracy", name, float(value), unit, low=float(low), high=float(high), **rest)


@dataclass
class Pass(Generic[Name]):
    """What one pass over a split leaves behind: records of each artifact by its name, and agreement, never the outputs
    themselves. `batch` is the largest batch.
    """

    records: dict[Name, Records]
    agreement: list[np.ndarray]
    batch: int


def one_pass(
    task: Task, artifacts: Mapping[Name, Artifact], split: Split, progress: Progress, threads: int
) -> Pass[Name]:
    """Run every artifact once over the whole split; agreement is that of "original" and "compressed", where both are.

    Raises `TaskError` if the split has no data or a batch has a size that the artifacts do not take, `NotFinite` if an
    output or a record is NaN or infinite.
    """
    runners = {name: artifact.open(threads) for name, artifact in artifacts.items()}
    parts: dict[Name, list[Records]] = {name: [] for name in runners}
    agreement, largest = [], 0
    for batch in progress.track(task.batches(split), f"accuracy on {split}"):
        largest = max(largest, task.count(batch))
        outputs: dict[str, Any] = {}
        for name, runner in runners.items():
            _check_size(task, artifacts[name], split, task.count(batch))
            outputs[name] = task.call(runner, batch)
            _check_finite(_arrays(outputs[name]), f"the {name} artifact {artifacts[name].folder}", "outputs", split)
            parts[name].append(np.asarray(task.metric.record(outputs[name], batch)))
            _check_finite(parts[name][-1:], f"the metric {task.metric.name} of task {task.name}", "records", split)
        if outputs.keys() >= {"original", "compressed"}:
            agreement.append(np.asarray(task.metric.agree(outputs["original"], outputs["compressed"]), dtype=float))
    if not largest:
        raise TaskError(f"task {task.name}: the split {split!r} is empty")
    return Pass({name: np.concatenate(own) for name, own in parts.items()}, agreement, largest)


def _check_size(task: Task, artifact: Artifact, split: Split, size: int) -> None:
    (takes,) = batch_sizes(artifact.manifest, (size,))
    if takes != size:
        raise TaskError(
            f"task {task.name}, split {split!r}: a batch holds {size} inputs, but the artifact takes "
            f"{takes} at a time; let the batch be dynamic, or give batches of {takes}"
        )


def _check_finite(arrays: Sequence[np.ndarray], whose: str, what: str, split: Split) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise NotFinite(f"{whose} gives NaN or infinite {what} on the split {split!r}")


def _arrays(output: Any) -> Sequence[np.ndarray]:
    if isinstance(output, Mapping):
        return list(output.values())
    return output if isinstance(output, tuple) else (output,)
