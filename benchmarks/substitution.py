"""ResNets of CIFAR-10 with depthwise-separable convolutions, healed by distillation within a budget.

    python -m benchmarks.substitution --date 2026-01-31 --task zoo:cifar10-resnet20 --seconds 1800 --threads 2

Writes the ledger after every network and the page docs/benchmarks-substitution.md. A network that is in the ledger of
that date and task, made in the same way, is not made again: its weights are kept in --models, so a run that was killed
goes on. Accuracy and latency are read off the ONNX files. FEATHERWEIGHT_DATA names the folder of the networks and their
data.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.core.context import Context, count_parameters, run_step
from featherweight.core.evaluate import records
from featherweight.core.files import write_text
from featherweight.core.fit import Training, steps_per_epoch
from featherweight.core.machine import describe
from featherweight.core.step import Step, step
from featherweight.core.target import Artifact, target
from featherweight.core.task import Task, find_task
from featherweight.model.skeleton import load, save
from featherweight.search.stopwatch import Stopwatch

from .budget import busy_seconds, step_seconds, train_for
from .compare import CLOCKS
from .record import Record
from .structured import INT8, PACKAGES, START, Row, in_int8, more_images, row, spread, table, timed

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normalized": {"normalize": True},
    "block by block": {"normalize": True, "imitate": {"lr": 2e-3}},
    "where it pays": {"normalize": True, "of": "latency", "keep": None, "multiplier": 1},
}
PAGE = """\
# Benchmarks: architecture substitution

This page is generated from a ledger by the command below; do not edit it. `substitute.separable` puts a depthwise and a
pointwise convolution in place of each convolution with a kernel; their number per channel is chosen layer by layer
within the budget of multiply-accumulates. The network is then trained to give the original's outputs. Fitting and
training together had the budget, in seconds of the processor per thread. Accuracy is that of the ONNX file over the
whole test split. *Faster* is how many times faster the file is in ONNX Runtime than the original's float32 file on one
thread; *than int8* is the same against the original after the same `quantize.static`. Brackets are 95% intervals.
"""


class Ledger(Record):
    """One run of this benchmark on one task."""

    benchmark: str = "substitution"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    task: str
    notes: str
    fewer: float
    budget_seconds: float
    threads: int
    training: dict[str, Any]
    clock: str
    rows: list[Row] = []


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.substitution", description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="zoo:cifar10-resnet20")
    parser.add_argument("--ways", nargs="+", default=["block by block"], choices=list(WAYS))
    parser.add_argument("--fewer", type=float, default=4.0, help="times fewer multiply-accumulates, at least")
    parser.add_argument("--multiplier", type=int, default=3, help="depthwise kernels per channel, at most")
    parser.add_argument("--seconds", type=float, default=1800, help="budget of each network")
    parser.add_argument("--share", type=float, default=0.3, help="of the budget for teaching block by block")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--lr", type=float, default=0.05, help="of the whole network, SGD")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--timing", type=float, default=3.0, help="seconds, for each file and batch size")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: where other work keeps it busy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=Path(tempfile.gettempdir()) / "substitution")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-substitution.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


def schedule(given: argparse.Namespace) -> Training:
    return Training(optimizer="sgd", lr=given.lr, weight_decay=5e-4, batch_size=128, teacher=0.9, temperature=4)


def substituting(way: str, given: argparse.Namespace, epochs: float) -> Step:
    """The step of one way; its blocks are taught for so many epochs, if they are taught."""
    settings = {"multiplier": given.multiplier, "keep": round(0.999 / given.fewer, 4), **WAYS[way]}
    if "imitate" in settings:
        settings["imitate"] = {**settings["imitate"], "epochs": epochs, "batch_size": 128}
    return step("substitute.separable", **settings)


def made(way: str, ctx: Context, given: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """Substitute and train within the budget; the model, and what it took."""
    start, busy, training = time.perf_counter(), busy_seconds(), schedule(given)
    steps = given.share * given.seconds / step_seconds(ctx.task.fresh(), ctx, training)
    taught = round(steps / steps_per_epoch(ctx, 128), 3)
    model, record = run_step(substituting(way, given, taught), ctx.task.fresh(), ctx)
    epochs = train_for(given.seconds - (busy_seconds() - busy), model, ctx, training)
    about = f"{summary(record.changed, len(record.left))} {record.step}"
    took = {"about": about, "epochs": epochs, "seconds": time.perf_counter() - start}
    return model, took | {"busy_seconds": busy_seconds() - busy}


def summary(changed: dict[str, str], left: int) -> str:
    """How many layers got which multiplier, in a sentence."""
    kinds = [how.split(":")[0] for how in changed.values()]
    counts = ", ".join(f"{kinds.count(kind)} with {kind}" for kind in sorted(set(kinds)))
    return f"{len(changed)} layers replaced ({counts}), {left} others left as they were."


class Run:
    """The ledger of this date and task, from the file if it lies there, written anew after every network."""

    def __init__(self, given: argparse.Namespace, task: Task):
        name = re.sub(r"\W+", "-", given.task.rpartition(":")[2])
        self.given, self.path = given, given.out / f"substitution-{name}-{given.date}.json"
        self.models = given.models / f"{name}-{given.date}"
        self.ledger = Ledger(
            date=given.date,
            command=command(given),
            machine=describe(),
            versions={package: version(package) for package in PACKAGES},
            seed=given.seed,
            task=given.task,
            notes=task.notes,
            fewer=given.fewer,
            budget_seconds=given.seconds,
            threads=given.threads,
            training=schedule(given).model_dump(mode="json", exclude={"epochs"}, exclude_defaults=True),
            clock=given.clock,
        )
        if self.path.is_file():
            before = Ledger.model_validate_json(self.path.read_text(encoding="utf-8"))
            terms = ("seed", "fewer", "budget_seconds", "threads", "training")
            if all(getattr(before, term) == getattr(self.ledger, term) for term in terms):
                self.ledger.rows = before.rows

    def network(self, way: str, ctx: Context) -> tuple[nn.Module, dict[str, Any]]:
        """The network made in one way, and what it took: from --models if it was made before."""
        folder = self.models / way.replace(" ", "-")
        known = [each for each in self.ledger.rows if each.name == way and each.form == "float32"]
        if known and folder.is_dir():
            took = known[0].model_dump(include={"about", "epochs", "seconds", "busy_seconds"})
            return load(folder, like=ctx.task.original), took
        model, took = made(way, ctx, self.given)
        save(model, folder)
        return model, took

    def keep(self, rows: list[Row]) -> None:
        names = {(each.name, each.form) for each in rows}
        self.ledger.rows = [*rows, *(each for each in self.ledger.rows if (each.name, each.form) not in names)]
        write_text(self.path, self.ledger.model_dump_json(indent=1) + "\n")


def measured(run: Run, task: Task, given: argparse.Namespace, folder: Path) -> list[Row]:
    """All rows: the original and every way, in floats and in int8."""
    runtime = target("onnxruntime")
    ctx = Context(task, seed=given.seed, device=torch.device("cpu"), stopwatch=Stopwatch(runtime, task))
    free = {name: task.free(name) for name in task.input_names}
    files: dict[tuple[str, str], Artifact] = {}
    rows: list[Row] = []
    for name in (START, *given.ways):
        model, took = (task.fresh(), {}) if name == START else run.network(name, ctx)
        count = count_parameters(model)
        for form, exported in (("float32", model), ("int8", in_int8(model, ctx))):
            place = folder / f"{name}-{form}".replace(" ", "-")
            files[name, form] = artifact = runtime.export(exported, task.example, place, free, bound=0.3)
            if not rows:
                original = records(task, partial(task.call, artifact.open()))
            rows.append(row(name, form, artifact, task, original, count, **took))
            print(f"{name} {form}: {spread(rows[-1].accuracy)}", file=sys.stderr, flush=True)
        run.keep(rows)
    timed(rows, files, task, given)
    return rows


def page(ledgers: list[Ledger]) -> str:
    """The whole page in Markdown: every network of one date."""
    lines = [PAGE.rstrip()]
    for ledger in ledgers:
        lines += [
            f"\n## {ledger.task}\n",
            f"* Date: {ledger.date}",
            f"* Machine: {ledger.machine}",
            f"* Versions: {', '.join(f'{name} {text}' for name, text in ledger.versions.items())}",
            f"* Command: `{ledger.command}`",
            f"* Budget: {ledger.budget_seconds:.0f} s on {ledger.threads} threads; {ledger.training}",
            f"* Data, test inputs: {ledger.rows[0].accuracy.n}. {ledger.notes}",
            f"* int8: `{INT8}`, with its defaults",
            "",
            *table(ledger.rows),
        ]
    return "\n".join(lines) + "\n"


def finished(folder: Path, date: str) -> list[Ledger]:
    """The ledgers of a date in which every network was timed."""
    found = (
        Ledger.model_validate_json(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob(f"substitution-*-{date}.json"))
    )
    return [ledger for ledger in found if ledger.rows and all(each.timings for each in ledger.rows)]


def command(given: argparse.Namespace) -> str:
    """The command that gives these figures."""
    ways = " ".join(f'"{way}"' for way in given.ways)
    return (
        f"python -m benchmarks.substitution --date {given.date} --task {given.task} --ways {ways} "
        f"--fewer {given.fewer:g} --multiplier {given.multiplier} --seconds {given.seconds:g} --share {given.share:g} "
        f"--threads {given.threads} --lr {given.lr:g} --clock {given.clock}"
    )


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    task = find_task(given.task)
    task = more_images(task) if given.task == "zoo:cifar10-resnet56" else task
    run = Run(given, task)
    with tempfile.TemporaryDirectory() as folder:
        run.keep(measured(run, task, given, Path(folder)))
    write_text(given.page, page(finished(given.out, given.date)))
    print(f"ledger: {run.path}\npage:   {given.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
