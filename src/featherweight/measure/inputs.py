"""Real inputs for an artifact at a chosen batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from featherweight.core.axis import Bench
from featherweight.core.errors import TaskError
from featherweight.core.target import Manifest, Runner

from .timing import Call


def batch_sizes(manifest: Manifest, wanted: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes of `wanted`, or the only one that the artifact takes if no first dimension is free."""
    if free_inputs(manifest):
        return tuple(wanted)
    return (next((item.shape[0] for item in manifest.inputs if item.shape), 1),)


def free_inputs(manifest: Manifest) -> frozenset[str]:
    """Names of the inputs whose first dimension is free."""
    return frozenset(item.name for item in manifest.inputs if item.shape and item.shape[0] == -1)


def sized(arrays: Mapping[str, np.ndarray], free: frozenset[str], size: int) -> dict[str, np.ndarray]:
    """`arrays` with `size` entries in the first dimension of those in `free`: cut, or repeated from the start."""
    return {
        name: np.take(array, np.arange(size) % len(array), axis=0) if name in free else array
        for name, array in arrays.items()
    }


def real_inputs(bench: Bench, runner: Runner, size: int) -> dict[str, np.ndarray]:
    """The first `size` inputs of the split by name, ready for the runtime; repeated where the first batch is smaller.

    Raises `TaskError` if the split is missing or empty.
    """
    batch = next(iter(bench.task.batches(bench.split, batch_size=size)), None)
    if batch is None:
        raise TaskError(f"task {bench.task.name}: the split {bench.split!r} is empty")
    return sized(bench.task.call(runner.prepare, batch), free_inputs(runner.manifest), size)


def free_sizes(bench: Bench, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Sizes of the free dimensions other than the batch, by label: a time depends on them too."""
    return {
        label: arrays[name].shape[place]
        for name in arrays
        for place, label in bench.task.free(name).items()
        if place > 0
    }


def loaded(bench: Bench, size: int, threads: int) -> dict[str, Call]:
    """Every artifact, loaded afresh, as a call of the runtime alone on `size` real inputs prepared beforehand."""
    calls: dict[str, Call] = {}
    for subject, artifact in bench.subjects.items():
        runner = artifact.open(threads)
        calls[subject] = partial(runner.session, **real_inputs(bench, runner, size))
    return calls
