"""Weights of 8 to 2 bits on a language model: every method of quantize.weights, with all bits that are stored.

    python -m benchmarks.weights --date 2026-01-31

Writes the ledger after every row, and the page docs/benchmarks-weights.md. A row of the same step that is in the ledger
of that date is not made again, so a run that was killed goes on. One thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from featherweight.core.context import Context, run_step
from featherweight.core.evaluate import records
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.soft import encodings
from featherweight.core.step import Step, step
from featherweight.core.target import target
from featherweight.core.task import Task, find_task

from .record import Figure, Record

PACKAGES = ("featherweight", "torch", "onnxruntime", "transformers")
METHODS = ("rtn", "hqq", "gptq", "awq")
BITS = (8, 4, 3, 2)
# LLM Compressor 0.14.0.1, GPTQ with searched clipping, asymmetric, groups of 32, stories260K: another run, another day.
PEER = {4: (4.59, 4.30), 3: (3.56, 5.43), 2: (2.53, 47.2)}
PAGE = """\
# Benchmarks: weights in few bits

This page is generated from a ledger by the command below; do not edit it. Perplexity is that of the ONNX file over the
whole test split (lower is better), brackets are 95% intervals. Bits per weight count integers, scales and zero points
of all weights that were quantized; nothing was trained. Seconds are those of the processor, calibration included.
"""


class Row(Record):
    """One step: how good, how small, and what it took."""

    step: dict[str, Any]
    bits_per_weight: float
    weights: int
    metric: Figure
    bytes: int
    cpu_seconds: float


class Ledger(Record):
    """One run of this benchmark."""

    benchmark: str = "weights"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    task: str
    metric: str
    notes: str
    original: Figure
    rows: list[Row]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="zoo:stories260k")
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-weights.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


def steps(given: argparse.Namespace) -> list[Step]:
    """Every method at every width; at two bits GPTQ also in half steps, and with a bit more for values of attention."""
    found = []
    for bits in given.bits:
        found += [{"bits": bits, "method": method} for method in given.methods]
        if bits == 2 and "gptq" in given.methods:
            halves = {"bits": 2, "method": "gptq", "symmetric": True}
            found += [halves, {**halves, "beam": 16, "scaling": True, "layer_bits": {"*.v_proj": 3}}]
    return [step("quantize.weights", group=given.group, **settings) for settings in found]


def judged(task: Task, model: torch.nn.Module, name: str = "onnxruntime") -> tuple[Figure, int]:
    """The metric of the model's artifact over the test split, and the bytes of its file."""
    with tempfile.TemporaryDirectory() as folder:
        artifact = target(name).export(model, task.example, folder + "/made", free=free(task), bound=1.0)
        runner = artifact.open()
        found = records(task, lambda batch: task.call(runner, batch))
        size = sum(file.stat().st_size for file in Path(folder).rglob("model.onnx*"))
    low, high = task.metric.interval(found)
    return Figure(value=task.metric.reduce(found), low=low, high=high, n=len(found)), size


def free(task: Task) -> dict[str, dict[int, str]]:
    return {name: task.free(name) for name in task.example}


def row(item: Step, task: Task, seed: int) -> Row:
    """Quantize, export and judge."""
    started = time.process_time()
    model, _ = run_step(item, task.fresh(), Context(task, seed=seed, device=torch.device("cpu")))
    seconds = time.process_time() - started
    stored = encodings(model).values()
    counts = [encoding.decode().numel() for encoding in stored]
    total = sum(encoding.bits_per_weight() * count for encoding, count in zip(stored, counts))
    figure, size = judged(task, model)
    return Row(
        step=item.full(),
        bits_per_weight=total / sum(counts),
        weights=sum(counts),
        metric=figure,
        bytes=size,
        cpu_seconds=seconds,
    )


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    lines = [PAGE, f"* Date: {ledger.date}", f"* Machine: {ledger.machine}"]
    lines.append(f"* Versions: {', '.join(f'{name} {number}' for name, number in ledger.versions.items())}")
    lines += [f"* Command: `{ledger.command}`", "", f"## {ledger.task}", "", ledger.notes, ""]
    lines += [
        f"| bits | method | bits per weight | {ledger.metric} | bytes | seconds |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    lines.append(f"| 32 | float32 | 32 | {text(ledger.original)} | | |")
    for item in ledger.rows:
        name = item.step["method"] + (", half steps" if item.step["symmetric"] else "")
        name += "".join(f", {glob} {bits} bits" for glob, bits in item.step["layer_bits"].items())
        figure = text(item.metric)
        lines.append(
            f"| {item.step['bits']} | {name} | {item.bits_per_weight:.2f} | {figure} | {item.bytes:,} "
            f"| {item.cpu_seconds:.0f} |"
        )
    lines += [
        "",
        "LLM Compressor 0.14.0.1, GPTQ with searched clipping, asymmetric, groups of 32, measured on another day:",
        "",
    ]
    lines += ["| bits per weight | perplexity |", "|---:|---:|"]
    lines += [f"| {bits} | {perplexity} |" for bits, perplexity in PEER.values()]
    return "\n".join(lines) + "\n"


def text(figure: Figure) -> str:
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def start(given: argparse.Namespace, task: Task, command: str) -> Ledger:
    """The ledger of that date if there is one, else a new one."""
    path = given.out / f"weights-{given.date}.json"
    if path.is_file():
        return Ledger.model_validate_json(path.read_text(encoding="utf-8"))
    return Ledger(
        date=given.date,
        command=command,
        machine=describe(),
        versions={name: version(name) for name in PACKAGES},
        seed=given.seed,
        task=given.task,
        metric=task.metric.name,
        notes=f"Groups of {given.group}. {task.notes}",
        original=judged(task, task.original)[0],
        rows=[],
    )


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    task = find_task(given.task)
    command = " ".join(["python -m benchmarks.weights", *(sys.argv[1:] if argv is None else argv)])
    ledger = start(given, task, command)
    for item in steps(given):
        if any(each.step == item.full() for each in ledger.rows):
            continue
        ledger.rows.append(row(item, task, given.seed))
        ledger.rows.sort(key=lambda each: (-each.step["bits"], each.step["method"], each.step["symmetric"]))
        write_text(given.out / f"weights-{given.date}.json", ledger.model_dump_json(indent=1) + "\n")
        write_text(given.page, page(ledger))
        print(item, f"{ledger.rows[-1].metric}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
