"""Latency: how long one call of the artifact takes."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveInt

from featherweight.core.axis import Axis, Bench
from featherweight.core.reading import Reading, Subject

from .inputs import batch_sizes, free_sizes, loaded, real_inputs
from .statistics import pooled_estimates, speedup
from .timing import Samples, repeat

_PERCENTILES = (50, 95, 99)


class Latency(Axis, name="latency"):
    """Time calls on real inputs, the artifacts interleaved in one process, and form their ratio moment by moment.

    Per batch size and number of threads: `p50_ms`, `p95_ms`, `p99_ms` (milliseconds per call of a whole batch),
    `throughput` (inputs per second, from the mean) and, for the compressed artifact, `speedup` (original /
    compressed). The artifacts are loaded afresh `loads` times. `seconds` is the time aimed at per condition for all
    artifacts together; slow artifacts take longer, 3 rounds per load at least. `n` counts timed runs (for the speedup:
    paired rounds). See `timing.interleave` and `statistics.speedup` for how.
    """

    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 32)
    threads: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    loads: Annotated[int, Field(ge=1, le=100)] = 6

    def read(self, bench: Bench) -> list[Reading]:
        """Raises `ArtifactError` for a damaged artifact, `TaskError` if the split has no data."""
        sizes = batch_sizes(bench.original.manifest, self.batches)
        conditions = [(size, threads) for threads in self.threads for size in sizes]
        found: list[Reading] = []
        for size, threads in bench.progress.track(conditions, "timing", len(conditions)):
            found += self._read(bench, size, threads)
        return found

    def _read(self, bench: Bench, size: int, threads: int) -> list[Reading]:
        samples = repeat(partial(loaded, bench, size, threads), self.loads, self.seconds, bench.seed)
        arrays = real_inputs(bench, bench.original.open(threads), size)
        conditions = {"batch": size, "threads": threads, **free_sizes(bench, arrays)}
        found: list[Reading] = []
        for subject in bench.subjects:
            found += _readings(bench, subject, samples[subject], conditions)
        if "compressed" in samples:
            value, low, high = speedup(samples["original"], samples["compressed"], seed=bench.seed)
            rounds = sum(len(load) for load in samples["original"])
            rest = {"low": low, "high": high, "n": rounds, "split": bench.split, "conditions": conditions}
            found.append(bench.reading("compressed", "latency", "speedup", value, "x", **rest))
        return found


def _readings(bench: Bench, subject: Subject, loads: list[Samples], conditions: dict[str, int]) -> list[Reading]:
    size = conditions["batch"]
    estimates = pooled_estimates(
        loads,
        lambda seconds: np.array([*np.percentile(seconds, _PERCENTILES) * 1e3, size / seconds.mean()]),
        seed=bench.seed,
    )
    names = [(f"p{percentile}_ms", "ms") for percentile in _PERCENTILES] + [("throughput", "inputs/s")]
    count = sum(load.size for load in loads)
    return [
        bench.reading(
            subject, "latency", name, value, unit, low=low, high=high, n=count, split=bench.split, conditions=conditions
        )
        for (name, unit), (value, low, high) in zip(names, estimates)
    ]
