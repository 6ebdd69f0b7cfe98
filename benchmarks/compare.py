"""Measure every contender's file on one network: accuracy on the whole test split, bytes, interleaved latency."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import dataclass, replace
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
from featherweight.measure.timing import Call, Clock, repeat

from .contender import Contender, Material, singles
from .peers import NotInstalled
from .record import CHOSEN, Figure, Network, Row, Timing
from .verdict import ORIGINAL

THREADS = 1


@dataclass(frozen=True)
class Terms:
    """What holds for all networks: seconds of timing for each contender and batch size, and where the peers live."""

    batches: list[int]
    seconds: float = 3.0
    seed: int = 0
    max_drop: float = 0.5
    peers: Path | None = None
    clock: str = "wall"


CLOCKS: dict[str, Clock] = {"wall": time.perf_counter_ns, "processor": time.thread_time_ns}


def compare(spec: str, entrants: list[Contender], folder: Path, terms: Terms, progress: Progress) -> Network:
    """Make every contender's file for the task `spec` under `folder`, then measure them all side by side."""
    task = find_task(spec)
    material = replace(prepare(task, folder, terms.seed), max_drop=terms.max_drop, peers=terms.peers, clock=terms.clock)
    rows = {ORIGINAL: Row(contender=ORIGINAL, package="featherweight", about="The network as it is, exported to ONNX.")}
    files = {ORIGINAL: material.original.file}
    for entrant in entrants:
        progress.say(f"{spec}: {entrant.name}")
        rows[entrant.name], path = enter(entrant, task, material)
        if path is not None:
            files[entrant.name] = path
    own = next((name for name in files if files[name] == files.get(CHOSEN)), None)
    judge(task, material, files, rows, own, progress)
    load = os.getloadavg()[0]
    shapes = {name: array.shape for name, array in inputs_of(task, material.original, 1).items()}
    for batch in terms.batches:
        progress.say(f"{spec}: latency at batch {batch}, load average {os.getloadavg()[0]:.1f}")
        timings = race(task, material, unique(files), batch, terms.seconds, own)
        for name, path in files.items():
            rows[name].timings.append(next(timings[other] for other in timings if files[other] == path))
    for name, path in files.items():
        rows[name].bytes = path.stat().st_size
    return Network(
        task=spec,
        metric=task.metric.name,
        unit=task.metric.unit,
        higher_is_better=task.metric.higher_is_better,
        calibration_inputs=sum(len(next(iter(batch.values()))) for batch in material.calibration),
        notes=task.notes,
        load=load,
        clock=terms.clock,
        timed=", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items()),
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


def enter(entrant: Contender, task: Task, material: Material) -> tuple[Row, Path | None]:
    """Let one contender make its file. What it raises is its result: it goes into the ledger, and the others go on."""
    own = material.folder / entrant.name.replace(" ", "-")
    own.mkdir(parents=True)
    row = Row(contender=entrant.name, package=entrant.package, about=entrant.about)
    material, start = replace(material, folder=own, notes=[]), time.perf_counter()
    path: Path | None = None
    try:
        path = entrant.make(material)
        task.call(runner(material.original, path), next(iter(task.batches("calibrate"))))
        row.note = "; ".join(material.notes)
    except NotInstalled as missing:
        path, row.state, row.reason = None, "not installed", str(missing)
    except Exception as error:
        traceback.print_exc()
        path, row.state = None, "failed"
        row.reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    row.seconds = time.perf_counter() - start
    return row, path


def runner(original: Artifact, path: Path) -> Runner:
    """A contender's file, called as the network is."""
    return Runner(original.target.load(path, THREADS), original.manifest)


def unique(files: dict[str, Path]) -> dict[str, Path]:
    """Without those whose file another has already."""
    return {name: path for name, path in files.items() if name == next(k for k, v in files.items() if v == path)}


def judge(
    task: Task, material: Material, files: dict[str, Path], rows: dict[str, Row], own: str | None, progress: Progress
) -> None:
    """Fill in accuracy over the whole test split, and the paired drop from the original and from our file `own`."""
    found: dict[Path, Records] = {}
    for name, path in unique(files).items():
        progress.say(f"{task.name}: accuracy of {name}")
        found[path] = records(task, partial(task.call, runner(material.original, path)), "test", progress)
    for name, path in files.items():
        now = found[path]
        rows[name].accuracy = figure(task.metric.reduce(now), task.metric.interval(now), len(now))
        rows[name].drop = drop(task.metric, found[files[ORIGINAL]], now)
        if own is not None and path != files[own]:
            rows[name].ahead = drop(task.metric, found[files[own]], now)


def drop(metric: Metric, original: Records, own: Records) -> Figure:
    lost = metric.drop(metric.reduce(original), metric.reduce(own))
    return figure(lost, metric.drop_interval(original, own), len(own))


def race(
    task: Task, material: Material, files: dict[str, Path], batch: int, seconds: float, own: str | None = None
) -> dict[str, Timing]:
    """Time every file on the same inputs, interleaved and loaded afresh; `seconds` is what each of them gets, about.

    `own` names the file that the others are compared with besides the original.
    """
    original, seed = material.original, material.seed
    inputs = inputs_of(task, original, batch)

    def load() -> dict[str, Call]:
        sessions = {name: original.target.load(path, THREADS) for name, path in files.items()}
        return {name: partial(session, **inputs) for name, session in sessions.items()}

    samples = repeat(load, seconds=seconds * len(files), seed=seed, clock=CLOCKS[material.clock])
    found = {}
    for name, taken in samples.items():
        (middle,) = pooled_estimates(taken, lambda runs: np.array([1e3 * np.median(runs)]), seed=seed)
        ratio = speedup(samples[ORIGINAL], taken, seed=seed)
        ahead = speedup(taken, samples[own], seed=seed) if own not in (None, name) else None
        rounds = sum(len(rows) for rows in taken)
        found[name] = Timing(
            batch=batch,
            threads=THREADS,
            p50_ms=figure(middle.value, middle[1:], rounds),
            faster=figure(ratio.value, ratio[1:], rounds),
            ahead=figure(ahead.value, ahead[1:], rounds) if ahead else None,
        )
    return found


def inputs_of(task: Task, original: Artifact, batch: int) -> dict[str, np.ndarray]:
    """The first calibration inputs as one batch of that size, repeated where there are fewer."""
    arrays = task.call(runner(original, original.file).prepare, next(iter(task.batches("calibrate", batch_size=batch))))
    return sized(arrays, free_inputs(original.manifest), batch)


def figure(value: float, interval: tuple[float, ...], n: int) -> Figure:
    return Figure(value=value, low=float(interval[0]), high=float(interval[1]), n=n)
