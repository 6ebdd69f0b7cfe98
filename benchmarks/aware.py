"""Training in few bits beside rounding to nearest in as many bits, on one network.

    python -m benchmarks.aware --date 2026-01-31 --threads 2 --models FOLDER

Writes the ledger and the page docs/benchmarks-aware.md. A model that is in FOLDER already, trained with the same
settings, is not trained again. It runs on CUDA where there is one; accuracy is read off the ONNX file either way.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.evaluate import records, torch_run
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.metric import Records
from featherweight.core.step import Step, step
from featherweight.core.target import target
from featherweight.core.task import Task, find_task
from featherweight.model.skeleton import load, save

from .record import Figure, Record

PACKAGES = ("featherweight", "torch", "onnxruntime")
WIDTHS: dict[str, dict[str, Any]] = {
    "W4A4": {"bits": 4, "activation_bits": 4, "epochs": 5},
    "W3A3": {"bits": 3, "activation_bits": 3, "epochs": 8},
    "W2A4": {"bits": 2, "activation_bits": 4, "epochs": 8},
    "ternary A4": {"ternary": True, "activation_bits": 4, "epochs": 8},
    "W2A2": {"bits": 2, "activation_bits": 2, "epochs": 12},
}
PAGE = """\
# Benchmarks: training in few bits

This page is generated from a ledger by the command below; do not edit it. `W4A4` has weights and the inputs of layers
in 4 bits; the first and the last layer have 8, and so has what is only added or pooled. *Rounded* is `quantize.static`
with least squared errors and no training, *trained* is `quantize.aware`. Accuracy is that of the ONNX file over the
whole test split, brackets are 95% intervals. Seconds of the processor are those of the whole step, calibration
included.
"""


class Row(Record):
    """One way to so many bits: how, how good, how large, and what it took."""

    width: str
    method: str
    step: dict[str, Any]
    accuracy: Figure
    drop: Figure
    bytes: int
    seconds: float
    cpu_seconds: float
    device: str
    threads: int


class Ledger(Record):
    """One run of this benchmark."""

    benchmark: str = "aware"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    task: str
    notes: str
    original: Figure
    rows: list[Row]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aware", description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="zoo:cifar10-resnet20")
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=list(WIDTHS))
    parser.add_argument("--times", type=float, default=1.0, help="how many times as long to train as by default")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=Path, default=Path("aware-models"), help="folder of trained models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-aware.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


def steps(given: argparse.Namespace) -> list[tuple[str, str, Step]]:
    """Width, method and step of every row."""
    found = []
    for width in given.widths:
        bits = WIDTHS[width]
        plain = {"bits": 2 if "ternary" in bits else bits["bits"], "activation_bits": bits["activation_bits"]}
        rounded = step("quantize.static", **plain, calibration="mse", weights="mse")
        settings = {**bits, "epochs": bits["epochs"] * given.times, "lr": given.lr, "precision": given.precision}
        found += [(width, "rounded", rounded), (width, "trained", step("quantize.aware", **settings))]
    return found


def made(item: Step, task: Task, folder: Path, given: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model of one row and what it took, from the folder if it lies there."""
    page = folder / "run.json"
    if page.is_file() and (found := json.loads(page.read_text()))["step"] == item.full():
        return load(folder / "model"), found
    ctx = Context(task, seed=given.seed, device=torch.device(given.device))
    cpu, wall = time.process_time(), time.perf_counter()
    model, _ = run_step(item, task.fresh(), ctx)
    took = {
        "step": item.full(),
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "device": given.device,
        "threads": given.threads,
    }
    save(model.cpu(), folder / "model")
    write_text(page, json.dumps(took, indent=1) + "\n")
    return model, took


def row(width: str, method: str, item: Step, task: Task, original: Records, given: argparse.Namespace) -> Row:
    """Make, export and judge one row."""
    model, took = made(item, task, given.models / f"{width} {method}".replace(" ", "-"), given)
    with tempfile.TemporaryDirectory() as folder:
        artifact = target("onnxruntime").export(model, task.example, folder + "/onnx", bound=1.0)
        runner = artifact.open()
        found = records(task, lambda batch: task.call(runner, batch))
        size = sum(file.stat().st_size for file in Path(folder).rglob("model.onnx*"))
    metric = task.metric
    lost = metric.drop(metric.reduce(original), metric.reduce(found))
    return Row(
        width=width,
        method=method,
        accuracy=figure(metric.reduce(found), metric.interval(found), len(found)),
        drop=figure(lost, metric.drop_interval(original, found), len(found)),
        bytes=size,
        **took,
    )


def figure(value: float, interval: tuple[float, float], count: int) -> Figure:
    return Figure(value=value, low=interval[0], high=interval[1], n=count)


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    lines = [
        PAGE,
        f"* Date: {ledger.date}",
        f"* Machine: {ledger.machine}",
        f"* Versions: {', '.join(f'{name} {version}' for name, version in ledger.versions.items())}",
        f"* Command: `{ledger.command}`",
        "",
        f"## {ledger.task}",
        "",
        f"Test inputs: {ledger.original.n}. {ledger.notes}",
        "",
        "| width | method | accuracy | lost | bytes | epochs | seconds of the processor |",
        "|---|---|---:|---:|---:|---:|---:|",
        f"| float32 | the original | {spread(ledger.original)} | | | | |",
    ]
    for each in ledger.rows:
        epochs = f"{each.step['epochs']:g}" if "epochs" in each.step else ""
        cells = [each.width, each.method, spread(each.accuracy), spread(each.drop), f"{each.bytes:,}", epochs]
        lines.append(f"| {' | '.join(cells)} | {each.cpu_seconds:.0f} |")
    return "\n".join(lines) + "\n"


def spread(found: Figure) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    task = find_task(given.task)
    original = records(task, torch_run(task, task.original))
    rows = []
    for width, method, item in steps(given):
        rows.append(row(width, method, item, task, original, given))
        print(f"{width} {method}: {spread(rows[-1].accuracy)}", file=sys.stderr, flush=True)
    ledger = Ledger(
        date=given.date,
        command="python -m benchmarks.aware " + " ".join(sys.argv[1:] if argv is None else argv),
        machine=describe(),
        versions={name: version(name) for name in PACKAGES},
        seed=given.seed,
        task=given.task,
        notes=task.notes,
        original=figure(task.metric.reduce(original), task.metric.interval(original), len(original)),
        rows=rows,
    )
    path = given.out / f"aware-{ledger.date}.json"
    write_text(path, ledger.model_dump_json(indent=1) + "\n")
    write_text(given.page, page(ledger))
    print(f"ledger: {path}\npage:   {given.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
