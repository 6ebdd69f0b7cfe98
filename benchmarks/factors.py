"""Low rank and tensor trains at equal parameters, before and after healing, beside weights of four bits.

    python -m benchmarks.factors --date 2026-01-31 --task zoo:stories260k --epochs 4

Writes the ledger after every row, and the page docs/benchmarks-factors.md. A row that is in the ledger of that date and
task is not made again, so a run that was killed goes on. One thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from featherweight.core.context import Context, count_parameters, run_step
from featherweight.core.evaluate import records
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.step import step
from featherweight.core.target import Artifact, target
from featherweight.core.task import Task, find_task

from .compare import CLOCKS, Material, figure, race
from .record import Figure, Record, Timing
from .verdict import ORIGINAL
from .weights import free, stored

PACKAGES = ("featherweight", "torch", "onnxruntime")
WAYS: dict[str, dict[str, Any]] = {
    "SVD, plain": {"kind": "factor.svd", "whiten": False, "multiple": 1},
    "SVD, whitened": {"kind": "factor.svd", "multiple": 1},
    "SVD, whitened, ranks by sensitivity": {"kind": "factor.svd", "allocation": "sensitivity", "multiple": 1},
    "tensor train": {"kind": "factor.train"},
}
BEST = {"kind": "factor.svd"}  # what is quantized to as many bytes as four bits take
FOUR = {"kind": "quantize.weights", "bits": 4, "method": "gptq"}
EIGHT = {"kind": "quantize.weights", "bits": 8}
PAGE = """\
# Benchmarks: layers in factors

This page is generated from a ledger by the command below; do not edit it. Every row starts from the same network and
the same calibration data; *share* is what is left of all parameters of the network, tables included. *Healed*: trained
for the epochs of the command, by the outputs of the original (`distill.logits`). The metric is that of the ONNX file
over the whole test split, brackets are 95% intervals. *Faster*: than the original's file, and than that of four bits,
all in the same rounds, median of the ratios; below 1 it is slower. Seconds are those of the processor, export and
judging not included.
"""


class Row(Record):
    """One way to factor, and what became of it."""

    name: str
    steps: list[dict[str, Any]]
    parameters: int = 0
    metric: Figure | None = None
    bytes: int = 0
    cpu_seconds: float = 0.0
    timings: list[Timing] = []


class Ledger(Record):
    """One run of this benchmark on one task."""

    benchmark: str = "factors"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    clock: str
    task: str
    metric: str
    higher_is_better: bool
    notes: str
    parameters: int
    bytes: int
    original: Figure
    rows: list[Row]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.factors", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="zoo:stories260k")
    parser.add_argument("--share", type=float, default=0.3, help="of all parameters, that is left")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--group", type=int, default=32, help="of the weights in four and eight bits")
    parser.add_argument("--epochs", type=float, default=2.0, help="of healing")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--timing", type=float, default=2.0, help="seconds, for each file and batch size")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: where other work keeps it busy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledgers")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-factors.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


# -- which rows -------------------------------------------------------------------------------------------------------
def rows_of(task: Task, given: argparse.Namespace) -> Iterator[Row]:
    """Every way at equal parameters, before and after healing; four bits; factors in as many bytes."""
    heal = {
        "kind": "distill.logits",
        "epochs": given.epochs,
        "lr": given.lr,
        "temperature": given.temperature,
    }
    four, eight = ({**each, "group": given.group} for each in (FOUR, EIGHT))
    yield Row(name="four bits", steps=[four])
    for name in given.ways:
        factored = with_share(WAYS[name], task, given)
        yield Row(name=name, steps=[factored])
        yield Row(name=f"{name}, healed", steps=[factored, heal])
    keep = round(stored_bits(four, task, given.seed) / stored_bits(eight, task, given.seed), 3)
    small = {**BEST, "keep": keep, "embeddings": True}
    yield Row(name="SVD, whitened, in eight bits: as many bytes as four", steps=[small, eight])
    yield Row(name="SVD, whitened, healed, in eight bits: as many bytes as four", steps=[small, heal, eight])


def with_share(settings: dict[str, Any], task: Task, given: argparse.Namespace) -> dict[str, Any]:
    """The settings with the `keep` that leaves that share of all parameters: of tables too, where they are factored."""
    tried = {**settings, "keep": given.share, "embeddings": True}
    quick = {**tried, "whiten": False, "allocation": "layer"} if settings["kind"] == "factor.svd" else tried
    item = step(quick.pop("kind"), **quick)
    _, record = run_step(item, task.fresh(), Context(task, seed=given.seed, device=torch.device("cpu")))
    layers = dict(task.original.named_modules())
    held = {layer.weight for name in record.changed if isinstance((layer := layers.get(name)), nn.Module)}
    factored = sum(weight.numel() for weight in held)
    total = count_parameters(task.original)
    keep = (given.share * total - (total - factored)) / factored
    if not 0 < keep < 1:
        raise SystemExit(
            f"{factored:,} of {total:,} parameters can be factored: a share of {given.share} is out of reach"
        )
    return {**tried, "keep": round(keep, 4)}


def stored_bits(settings: dict[str, Any], task: Task, seed: int) -> float:
    """Bits per weight of what this step stores, scales included."""
    options = {name: value for name, value in settings.items() if name not in ("kind", "method")}
    model, _ = run_step(step(settings["kind"], **options), task.fresh(), Context(task, seed=seed))
    return stored(model)[1]


# -- one row ----------------------------------------------------------------------------------------------------------
class Bench:
    """The original's file and that of four bits, which every other is timed beside."""

    def __init__(self, task: Task, given: argparse.Namespace, folder: Path):
        self.task, self.given, self.folder = task, given, folder
        self.original = self.export(task.original, "original")
        self.four: Artifact | None = None

    def export(self, model: nn.Module, name: str) -> Artifact:
        return target("onnxruntime").export(
            model, self.task.example, self.folder / name, free=free(self.task), bound=1.0
        )

    def judged(self, artifact: Artifact) -> Figure:
        found = records(self.task, partial(self.task.call, artifact.open()))
        return figure(self.task.metric.reduce(found), self.task.metric.interval(found), len(found))

    def fill(self, row: Row) -> None:
        """Make the row's model, export it, judge its file and time it."""
        model = self._made(row)
        row.parameters = count_parameters(model)
        artifact = self.export(model, str(len(list(self.folder.iterdir()))))
        row.metric, row.bytes = self.judged(artifact), artifact.bytes()
        files = {ORIGINAL: self.original.file, "four": self._four().file, "own": artifact.file}
        material = Material(self.task, self.original, [], self.folder, self.given.seed, clock=self.given.clock)
        for batch in self.given.batches:
            row.timings.append(race(self.task, material, files, batch, self.given.timing, own="four")["own"])

    def _made(self, row: Row) -> nn.Module:
        started = time.process_time()
        model, ctx = self.task.fresh(), Context(self.task, seed=self.given.seed, device=torch.device("cpu"))
        for settings in row.steps:
            options = {name: value for name, value in settings.items() if name != "kind"}
            model, _ = run_step(step(settings["kind"], **options), model, ctx)
        row.cpu_seconds = time.process_time() - started
        return model

    def _four(self) -> Artifact:
        if self.four is None:
            row = Row(name="four bits", steps=[{**FOUR, "group": self.given.group}])
            self.four = self.export(self._made(row), "four")
        return self.four


# -- the page ---------------------------------------------------------------------------------------------------------
def page(ledgers: list[Ledger]) -> str:
    """The whole page in Markdown."""
    lines = [PAGE]
    for ledger in ledgers:
        versions = ", ".join(f"{name} {number}" for name, number in ledger.versions.items())
        better = "higher" if ledger.higher_is_better else "lower"
        lines += [f"## {ledger.task}", "", f"* Date: {ledger.date}", f"* Machine: {ledger.machine}"]
        lines += [f"* Versions: {versions}", f"* Latency: of one thread, {ledger.clock} clock"]
        lines += [f"* Command: `{ledger.command}`", "", ledger.notes, ""]
        batches = [timing.batch for timing in ledger.rows[0].timings] if ledger.rows else []
        heads = [f"batch {batch}: faster than the original | than four bits" for batch in batches]
        lines += [
            f"| method | share | {ledger.metric} ({better} is better) | bytes | {' | '.join(heads)} | seconds |",
            f"|---|---:|---:|---:|{'---:|' * 2 * len(batches)}---:|",
            f"| float32 | 100% | {text(ledger.original)} | {ledger.bytes:,} | {'| ' * 2 * len(batches)}|",
        ]
        lines += [cells(row, ledger.parameters) for row in ledger.rows]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def cells(row: Row, whole: int) -> str:
    assert row.metric is not None
    times = []
    for timing in row.timings:
        # `ahead` of a race is how many times faster its own file, here that of four bits, was than this one
        times.append(f"{timing.faster.value:.2f} [{timing.faster.low:.2f}, {timing.faster.high:.2f}]")
        times.append(f"{1 / timing.ahead.value:.2f}" if timing.ahead else "")
    shown = " | ".join(times)
    return (
        f"| {row.name} | {row.parameters / whole:.1%} | {text(row.metric)} | {row.bytes:,} | {shown} "
        f"| {row.cpu_seconds:.0f} |"
    )


def text(found: Figure) -> str:
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


# -- the run ----------------------------------------------------------------------------------------------------------
def place(given: argparse.Namespace) -> Path:
    name: str = given.task
    return Path(given.out) / f"factors-{name.split(':')[-1]}-{given.date}.json"


def start(given: argparse.Namespace, bench: Bench, command: str) -> Ledger:
    """The ledger of that date and task if there is one, else a new one."""
    if place(given).is_file():
        found = Ledger.model_validate_json(place(given).read_text(encoding="utf-8"))
        if found.seed != given.seed:
            raise SystemExit(f"{place(given)} has the seed {found.seed}; take another --date or --out for {given.seed}")
        if command not in found.command.split("; "):
            found.command += f"; {command}"
        return found
    task = bench.task
    return Ledger(
        date=given.date,
        command=command,
        machine=describe(),
        versions={name: version(name) for name in PACKAGES},
        seed=given.seed,
        clock=given.clock,
        task=given.task,
        metric=task.metric.name,
        higher_is_better=task.metric.higher_is_better,
        notes=f"Four and eight bits in groups of {given.group}. {task.notes}",
        parameters=count_parameters(task.original),
        bytes=bench.original.bytes(),
        original=bench.judged(bench.original),
        rows=[],
    )


def all_ledgers(out: Path, date: str) -> list[Ledger]:
    """The ledgers of that date, of all tasks."""
    paths = sorted(out.glob(f"factors-*-{date}.json"))
    return [Ledger.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    task = find_task(given.task)
    command = " ".join(["python -m benchmarks.factors", *(sys.argv[1:] if argv is None else argv)])
    with TemporaryDirectory() as folder:
        bench = Bench(task, given, Path(folder))
        ledger = start(given, bench, command)
        for row in rows_of(task, given):
            if any(each.steps == row.steps for each in ledger.rows):
                continue
            print(row.name, file=sys.stderr, flush=True)
            bench.fill(row)
            ledger.rows = [each for each in ledger.rows if each.name != row.name] + [row]
            write_text(place(given), ledger.model_dump_json(indent=1) + "\n")
            write_text(given.page, page(all_ledgers(given.out, given.date)))
            print(f"{row.name}: {row.metric}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
