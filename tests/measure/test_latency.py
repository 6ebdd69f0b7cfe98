"""Latency: known delays are found, and equal artifacts are not told apart."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from measured_task import two_inputs
from numpy_target import NumpyTarget

from featherweight.core.axis import Bench
from featherweight.core.errors import FeatherweightError, TaskError
from featherweight.core.reading import Reading, find
from featherweight.core.target import Artifact
from featherweight.measure.inputs import batch_sizes, real_inputs, sized
from featherweight.measure.latency import Latency


def value(readings: list[Reading], subject: str, name: str, **conditions: int) -> float:
    reading = find(readings, subject, name, **conditions)
    assert reading is not None and reading.low is not None and reading.high is not None
    assert reading.low <= reading.value <= reading.high
    return reading.value


def test_known_delays_are_found(bench: Callable[..., Bench], tmp_path: Path, original: Artifact):
    from numpy_target import variant

    made = bench(delay=0.004)
    made.original = variant(original, tmp_path / "slow", delay=0.012)
    readings = Latency(batches=(1, 4), seconds=0.6, loads=3).read(made)
    for batch in (1, 4):
        assert 12 <= value(readings, "original", "p50_ms", batch=batch, threads=1) < 16
        assert 4 <= value(readings, "compressed", "p50_ms", batch=batch, threads=1) < 7
        assert 1.8 < value(readings, "compressed", "speedup", batch=batch, threads=1) < 3.2
        p50, p95, p99 = (value(readings, "original", f"p{p}_ms", batch=batch) for p in (50, 95, 99))
        assert p50 <= p95 <= p99
        assert batch / 0.02 < value(readings, "original", "throughput", batch=batch) <= batch / 0.012


def test_counts_are_runs_and_rounds(bench: Callable[..., Bench]):
    readings = Latency(batches=(2,), seconds=0.1, loads=2).read(bench(delay=0.002))
    p50, speedup = find(readings, "compressed", "p50_ms"), find(readings, "compressed", "speedup")
    assert p50 is not None and speedup is not None and p50.n is not None and speedup.n is not None
    assert speedup.n >= 6
    assert p50.n > speedup.n


def test_without_a_compressed_artifact_there_is_no_ratio(bench: Callable[..., Bench]):
    made = bench()
    made.compressed = None
    readings = Latency(batches=(1,), seconds=0.05, loads=2).read(made)
    assert {reading.name for reading in readings} == {"p50_ms", "p95_ms", "p99_ms", "throughput"}


def test_an_empty_split_is_said(original: Artifact):
    with pytest.raises(TaskError, match="'test' is empty"):
        Latency(seconds=0.05).read(Bench(two_inputs(test=[]), original))


def test_inputs_are_real_and_repeated_where_there_are_few(original: Artifact):
    task = two_inputs()
    bench = Bench(two_inputs(test=list(task.batches("test", batch_size=3))), original)
    arrays = real_inputs(bench, original.open(), 7)
    assert {name: (array.shape, array.dtype.name) for name, array in arrays.items()} == {
        "x": ((7, 8), "float32"),
        "kind": ((7,), "int64"),
    }
    first = next(iter(task.batches("test", batch_size=3)))["x"].numpy()
    assert np.array_equal(arrays["x"], first[[0, 1, 2, 0, 1, 2, 0]])
    assert arrays["x"].flags.c_contiguous


def test_an_artifact_of_one_batch_size_is_timed_at_that(tmp_path: Path):
    task = two_inputs(dynamic={})
    fixed = NumpyTarget().export(task.original, task.example, tmp_path / "fixed", free={})
    task = two_inputs(dynamic={}, batch_size=2)
    assert batch_sizes(fixed.manifest, (1, 32)) == (2,)
    readings = Latency(seconds=0.05, loads=2).read(Bench(task, fixed))
    assert {reading.conditions["batch"] for reading in readings} == {2}


def test_sized_leaves_other_inputs_alone():
    arrays = {"x": np.arange(3), "table": np.arange(5)}
    assert {name: array.tolist() for name, array in sized(arrays, frozenset({"x"}), 2).items()} == {
        "x": [0, 1],
        "table": [0, 1, 2, 3, 4],
    }


@pytest.mark.parametrize(
    "settings", [{"batches": ()}, {"batches": (0,)}, {"threads": (-1,)}, {"seconds": 0}, {"loads": 0}, {"warmth": 1}]
)
def test_settings_out_of_range_are_one_line(settings: dict[str, object]):
    from featherweight.core.axis import axis

    with pytest.raises(FeatherweightError) as caught:
        axis("latency", **settings)
    assert next(iter(settings)) in str(caught.value) and "\n" not in str(caught.value)
