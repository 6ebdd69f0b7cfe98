"""Measure every contender's file on one network: accuracy on the whole test split, bytes, interleaved latency."""

from __future__ import annotations

import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from featherweight.core.evaluate import records
from featherweight.core.metric import Metric, Records
from featherweight.core.progress import Progress
from featherweight.core.target import Artifact, Runner, target
from featherweight.core.task import Task, find_task
from featherweight.measure.inputs import free_inputs, sized
from featherweight.measure.statistics import pooled_estimates, speedup
from featherweight.measure.timing import Call, repeat

from .contender import Contender, Material
from .record import Figure, Network, Row, Timing

ORIGINAL = "float32 original"
THREADS = 1


def compare(
    spec: str,
    entrants: list[Contender],
    folder: Path,
    batches: list[int],
    seconds: float,
    seed: int,
    progress: Progress,
) -> Network:
    """Make every contender's file for the task `spec` under `folder`, then measure them all side by side."""
    task = find_task(spec)
    material = prepare(task, folder, seed)
    rows = {ORIGINAL: Row(contender=ORIGINAL, package="featherweight", about="The network as it is, exported to ONNX.")}
    files = {ORIGINAL: material.original.file}
    for entrant in entrants:
        progress.say(f"{spec}: {entrant.name}")
        rows[entrant.name], path = enter(entrant, material)
        if path is not None:
            files[entrant.name] = path
    runners = {
        name: Runner(material.original.target.load(path, THREADS), material.original.manifest)
        for name, path in files.items()
    }
    judge(task, runners, rows, progress)
    for batch in batches:
        progress.say(f"{spec}: latency at batch {batch}")
        for name, timing in race(task, material.original, files, batch, seconds, seed).items():
            rows[name].timings.append(timing)
    for name, path in files.items():
        rows[name].bytes = path.stat().st_size
    return Network(
        task=spec,
        metric=task.metric.name,
        unit=task.metric.unit,
        higher_is_better=task.metric.higher_is_better,
        calibration_inputs=sum(len(next(iter(batch.values()))) for batch in material.calibration),
        notes=task.notes,
        rows=list(rows.values()),
    )


def prepare(task: Task, folder: Path, seed: int) -> Material:
    """Export the float network once, and gather the calibration batches."""
    free = {name: task.free(name) for name in task.input_names}
    original = target("onnxruntime").export(task.original, task.example, folder / "original", free)
    calibration = [
        {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in task.named_inputs(batch).items()}
        for batch in task.batches("calibrate")
    ]
    if len({len(array) for batch in calibration for array in batch.values()}) > 1:
        calibration = singles(calibration)
    return Material(task, original, calibration, folder, seed)


def singles(batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The same inputs, each as a batch of its own: ONNX Runtime's calibration by entropy wants batches of one size."""
    return [
        {name: array[place : place + 1] for name, array in batch.items()}
        for batch in batches
        for place in range(len(next(iter(batch.values()))))
    ]


def enter(entrant: Contender, material: Material) -> tuple[Row, Path | None]:
    """Let one contender make its file. What it raises is its result: it goes into the ledger, and the others go on."""
    own = material.folder / entrant.name.replace(" ", "-")
    own.mkdir(parents=True)
    row = Row(contender=entrant.name, package=entrant.package, about=entrant.about)
    start = time.perf_counter()
    try:
        path: Path | None = entrant.make(replace(material, folder=own))
    except Exception as error:
        traceback.print_exc()
        path, row.state = None, "failed"
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    row.seconds = time.perf_counter() - start
    return row, path


def judge(task: Task, runners: dict[str, Runner], rows: dict[str, Row], progress: Progress) -> None:
    """Fill in accuracy over the whole test split, and the paired drop against the original on the same inputs."""
    found = {name: records(task, partial(task.call, runner), "test", progress) for name, runner in runners.items()}
    for name, own in found.items():
        rows[name].accuracy = figure(task.metric.reduce(own), task.metric.interval(own), len(own))
        rows[name].drop = drop(task.metric, found[ORIGINAL], own)


def drop(metric: Metric, original: Records, own: Records) -> Figure:
    lost = metric.drop(metric.reduce(original), metric.reduce(own))
    return figure(lost, metric.drop_interval(original, own), len(own))


def race(
    task: Task, original: Artifact, files: dict[str, Path], batch: int, seconds: float, seed: int
) -> dict[str, Timing]:
    """Time every file on the same inputs, interleaved and loaded afresh; `seconds` is what each of them gets, about."""
    inputs = inputs_of(task, original, batch)

    def load() -> dict[str, Call]:
        sessions = {name: original.target.load(path, THREADS) for name, path in files.items()}
        return {name: partial(session, **inputs) for name, session in sessions.items()}

    samples = repeat(load, seconds=seconds * len(files), seed=seed)
    found = {}
    for name, own in samples.items():
        (middle,) = pooled_estimates(own, lambda taken: np.array([1e3 * np.median(taken)]), seed=seed)
        ratio = speedup(samples[ORIGINAL], own, seed=seed)
        rounds = sum(len(rows) for rows in own)
        found[name] = Timing(
            batch=batch,
            threads=THREADS,
            p50_ms=figure(middle.value, middle[1:], rounds),
            faster=figure(ratio.value, ratio[1:], rounds),
        )
    return found


def inputs_of(task: Task, original: Artifact, batch: int) -> dict[str, np.ndarray]:
    """The first inputs of the test split as one batch of that size, repeated where there are fewer."""
    runner = Runner(original.target.load(original.file), original.manifest)
    arrays = task.call(runner.prepare, next(iter(task.batches("test", batch_size=batch))))
    return sized(arrays, free_inputs(original.manifest), batch)


def figure(value: float, interval: tuple[float, ...], n: int) -> Figure:
    return Figure(value=value, low=float(interval[0]), high=float(interval[1]), n=n)
