"""A language model with half of its weights pruned, by every score, beside LLM Compressor: perplexity off the file.

    python -m benchmarks.sparsity --date 2026-01-31 --peers FOLDER

Writes the ledger after every row, and the page docs/benchmarks-sparsity.md. A row that is in the ledger of that date
and task is not made again, so a run that was killed goes on. One thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.api import pack
from featherweight.core.context import Context, run_step
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.task import Task, find_task

from .peers import VARIABLE, NotInstalled, Peer
from .record import Figure, Record
from .weights import PACKAGES, PEER, from_peer, judged, text

NONE = "none"  # single weights
SCORES = ("magnitude", "wanda", "sparsegpt", "obs", "fisher")
EXTRAS = ("magnitude over all layers", "sparsegpt, drift made up for", "sparsegpt by sensitivity")
PAGE = """\
# Benchmarks: half of the weights pruned

This page is generated from a ledger by the command below; do not edit it. Every row starts from the same float32
network and the same calibration data, without any training, and prunes every linear layer but the tied head. The metric
is that of the ONNX file over the whole test split (LLM Compressor's weights are put into the network first), brackets
are 95% intervals. *Zeros* are the share of the pruned layers' weights. Seconds are those of the processor, calibration
included, export and judging not. The two sizes say where zeros pay: the ONNX file stores them as any other number, so
it is no smaller (and its kernels compute with them, so it is no faster); the coded checkpoint stores what is left.
"""


class Row(Record):
    """One way to prune: how good, how sparse, and what it took. One that failed stays, with its reason."""

    name: str
    pattern: str
    step: dict[str, Any]
    state: str = "done"
    reason: str = ""
    metric: Figure | None = None
    zeros: float = 0.0
    weights: int = 0
    bytes: int = 0
    coded_bytes: int = 0
    cpu_seconds: float = 0.0


class Ledger(Record):
    """One run of this benchmark on one task."""

    benchmark: str = "sparsity"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    task: str
    metric: str
    higher_is_better: bool
    notes: str
    original: Figure
    original_bytes: int
    original_coded_bytes: int
    rows: list[Row]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparsity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="zoo:stories260k")
    parser.add_argument("--sparsity", type=float, default=0.5, help="of single weights")
    parser.add_argument("--patterns", nargs="+", default=[NONE, "2:4"], help="none, or n:m")
    parser.add_argument("--methods", nargs="+", default=[*SCORES, "extras", "peer"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledgers")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-sparsity.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    parser.add_argument("--peers", type=Path, default=os.environ.get(VARIABLE), help="folder of the environments")
    return parser.parse_args(argv)


def contenders(given: argparse.Namespace) -> Iterator[Row]:
    """Every score at every pattern, each layer alike, as the papers do; what goes beyond them; and the peer."""
    for pattern in given.patterns:
        single = pattern == NONE
        plain: dict[str, Any] = {"kind": "prune.weights"}
        plain |= {"sparsity": given.sparsity} if single else {"pattern": pattern}
        for score in (each for each in SCORES if each in given.methods):
            # magnitude and the Fisher information would compete over all layers by default
            alike = {"scope": "layer"} if single and score in ("magnitude", "fisher") else {}
            yield Row(name=score, pattern=pattern, step={**plain, "score": score, **alike})
        if "extras" in given.methods:
            yield Row(name=EXTRAS[1], pattern=pattern, step={**plain, "score": "sparsegpt", "compensate": True})
            if single:
                yield Row(name=EXTRAS[0], pattern=pattern, step=plain)
                own = {"score": "sparsegpt", "allocation": "sensitivity"}
                yield Row(name=EXTRAS[2], pattern=pattern, step={**plain, **own})
        if "peer" in given.methods and given.task == "zoo:stories260k":
            for score in ("wanda", "sparsegpt"):
                settings = {"score": score, "pattern": "0:0" if single else pattern, "sparsity": given.sparsity}
                yield Row(name=f"{PEER} {score}", pattern=pattern, step=settings)


def made(row: Row, task: Task, seed: int) -> nn.Module:
    """The model after the row's step; the row gets what it took and how many zeros there are."""
    started = time.process_time()
    settings = {name: value for name, value in row.step.items() if name != "kind"}
    ctx = Context(task, seed=seed, device=torch.device("cpu"))
    model, _ = run_step(step(row.step["kind"], **settings), task.fresh(), ctx)
    row.cpu_seconds = time.process_time() - started
    kept = [encoding.decode() for encoding in encodings(model).values()]
    row.weights = sum(weight.numel() for weight in kept)
    row.zeros = sum(int((weight == 0).sum()) for weight in kept) / row.weights
    return model


def coded_size(model: nn.Module) -> int:
    """The bytes of the model's coded checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        return pack(model, Path(folder) / "model.fwc").stat().st_size


def fill(row: Row, task: Task, given: argparse.Namespace) -> None:
    """Make the row's model, export and judge it."""
    ours = "kind" in row.step
    try:
        if ours:
            model = made(row, task, given.seed)
        else:
            model, figures = from_peer("prune_llmcompressor.py", row.step, task, given.peers)
            row.weights, row.cpu_seconds = figures["weights"], figures["cpu_seconds"]
            row.zeros = figures["zeros"] / row.weights
    except (NotInstalled, RuntimeError) as error:
        row.state = "not installed" if isinstance(error, NotInstalled) else "failed"
        row.reason = " ".join(str(error).split())[:300]
        return
    row.metric, size = judged(task, model)
    if ours:  # the peer's weights are no file of its own
        row.bytes, row.coded_bytes = size, coded_size(model)


def page(ledgers: list[Ledger]) -> str:
    """The whole page in Markdown."""
    lines = [PAGE]
    for ledger in ledgers:
        versions = ", ".join(f"{name} {number}" for name, number in ledger.versions.items())
        metric = f"{ledger.metric} ({'higher' if ledger.higher_is_better else 'lower'} is better)"
        lines += [f"## {ledger.task}", "", f"* Date: {ledger.date}", f"* Machine: {ledger.machine}"]
        lines += [f"* Versions: {versions}", f"* Command: `{ledger.command}`", "", ledger.notes, ""]
        lines += [
            f"| pattern | score | zeros | {metric} | bytes (ONNX) | bytes (coded) | seconds |",
            "|---|---|---:|---:|---:|---:|---:|",
            f"| | float32 | 0.0% | {text(ledger.original)} | {ledger.original_bytes:,} | "
            f"{ledger.original_coded_bytes:,} | |",
        ]
        lines += [cells(row) for row in ledger.rows if row.state == "done"]
        failed = [row for row in ledger.rows if row.state != "done"]
        lines += ["", *(f"{row.pattern}, {row.name}: {row.state}: {row.reason}" for row in failed), ""]
    return "\n".join(lines).rstrip() + "\n"


def cells(row: Row) -> str:
    sizes = [f"{size:,}" if size else "" for size in (row.bytes, row.coded_bytes)]
    assert row.metric is not None
    pattern = "single weights" if row.pattern == NONE else row.pattern
    return (
        f"| {pattern} | {row.name} | {row.zeros:.1%} | {text(row.metric)} | {sizes[0]} | {sizes[1]} | "
        f"{row.cpu_seconds:.0f} |"
    )


def place(given: argparse.Namespace) -> Path:
    name: str = given.task
    return Path(given.out) / f"sparsity-{name.split(':')[-1]}-{given.date}.json"


def start(given: argparse.Namespace, task: Task, command: str) -> Ledger:
    """The ledger of that date and task if there is one, else a new one."""
    if place(given).is_file():
        found = Ledger.model_validate_json(place(given).read_text(encoding="utf-8"))
        if found.seed != given.seed:
            raise SystemExit(f"{place(given)} has the seed {found.seed}; take another --date or --out for {given.seed}")
        if command not in found.command.split("; "):
            found.command += f"; {command}"
        return found
    versions = {name: version(name) for name in PACKAGES}
    try:
        versions |= {f"{name} (peer)": text for name, text in Peer("llmcompressor", given.peers).versions().items()}
    except NotInstalled as missing:
        print(missing, file=sys.stderr)
    original, size = judged(task, task.original)
    return Ledger(
        date=given.date,
        command=command,
        machine=describe(),
        versions=versions,
        seed=given.seed,
        task=given.task,
        metric=task.metric.name,
        higher_is_better=task.metric.higher_is_better,
        notes=task.notes,
        original=original,
        original_bytes=size,
        original_coded_bytes=coded_size(task.original),
        rows=[],
    )


def all_ledgers(out: Path, date: str) -> list[Ledger]:
    """The ledgers of that date, of all tasks."""
    paths = sorted(out.glob(f"sparsity-*-{date}.json"))
    return [Ledger.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    task = find_task(given.task)
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m benchmarks.sparsity", *words]).replace(str(given.peers), "FOLDER")
    ledger = start(given, task, command)
    for row in contenders(given):
        if any(each.step == row.step and each.state == "done" for each in ledger.rows):
            continue
        print(f"{row.pattern}: {row.name}", file=sys.stderr, flush=True)
        fill(row, task, given)
        ledger.rows = [each for each in ledger.rows if each.step != row.step] + [row]
        ledger.rows.sort(key=lambda each: (each.pattern != NONE, each.pattern, each.name.startswith(PEER), each.name))
        write_text(place(given), ledger.model_dump_json(indent=1) + "\n")
        write_text(given.page, page(all_ledgers(given.out, given.date)))
        print(f"{row.pattern}: {row.name}: {row.metric or row.reason}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
