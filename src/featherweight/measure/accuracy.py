"""Accuracy: the task's own metric, read off the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from featherweight.core.axis import Axis, Bench
from featherweight.core.errors import NotFinite, TaskError
from featherweight.core.machine import cores
from featherweight.core.metric import Metric, Records
from featherweight.core.reading import Reading, Subject

from .inputs import batch_sizes
from .statistics import share_estimate

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
        passed = _one_pass(bench, self.threads or cores())
        metric, found = bench.task.metric, []
        rest: dict[str, Any] = {"split": bench.split, "conditions": {"batch": passed.batch}}
        records = {subject: np.concatenate(parts) for subject, parts in passed.records.items()}
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
class _Pass:
    """What one pass over the split leaves behind: records and agreement, never the outputs themselves."""

    records: dict[Subject, list[Records]]
    agreement: list[np.ndarray] = field(default_factory=list)
    batch: int = 0


def _one_pass(bench: Bench, threads: int) -> _Pass:
    task = bench.task
    runners = {subject: artifact.open(threads) for subject, artifact in bench.subjects.items()}
    passed = _Pass({subject: [] for subject in runners})
    for batch in bench.progress.track(task.batches(bench.split), f"accuracy on {bench.split}"):
        passed.batch = max(passed.batch, task.count(batch))
        _check_size(bench, task.count(batch))
        outputs = {subject: task.call(runner, batch) for subject, runner in runners.items()}
        for subject, output in outputs.items():
            _check_finite(bench, subject, output)
            passed.records[subject].append(np.asarray(task.metric.record(output, batch)))
        if "compressed" in outputs:
            passed.agreement.append(
                np.asarray(task.metric.agree(outputs["original"], outputs["compressed"]), dtype=float)
            )
    if not passed.records["original"]:
        raise TaskError(f"task {task.name}: the split {bench.split!r} is empty")
    return passed


def _check_size(bench: Bench, size: int) -> None:
    (takes,) = batch_sizes(bench.original.manifest, (size,))
    if takes != size:
        raise TaskError(
            f"task {bench.task.name}, split {bench.split!r}: a batch holds {size} inputs, but the artifact takes "
            f"{takes} at a time; let the batch be dynamic, or give batches of {takes}"
        )


def _check_finite(bench: Bench, subject: Subject, output: Any) -> None:
    for array in _arrays(output):
        if not np.isfinite(array).all():
            folder = bench.subjects[subject].folder
            raise NotFinite(
                f"the {subject} artifact {folder} gives NaN or infinite outputs on the split {bench.split!r}"
            )


def _arrays(output: Any) -> Sequence[np.ndarray]:
    if isinstance(output, Mapping):
        return list(output.values())
    return output if isinstance(output, tuple) else (output,)
