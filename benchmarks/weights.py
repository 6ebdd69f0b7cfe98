"""Weights of 8 to 2 bits beside LLM Compressor: all stored bits counted, before and after short training.

    python -m benchmarks.weights --date 2026-01-31 --peers FOLDER

Writes the ledger after every row, and the page docs/benchmarks-weights.md. A row that is in the ledger of that date and
task is not made again, so a run that was killed goes on. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.evaluate import records
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.soft import encodings
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task, find_task

from .peers import VARIABLE, NotInstalled, Peer, write_calibration
from .record import Figure, Record

PACKAGES = ("featherweight", "torch", "onnxruntime", "transformers")
METHODS = ("rtn", "hqq", "gptq", "awq", "trellis", "peer")
BITS = (8, 4, 3, 2)
TRELLIS = {4: (4, 4.4), 3: (3, 3.4), 2: (2, 2.4)}  # alone, and with as many bits as groups of 32 take
PEER = "LLM Compressor"
PAGE = """\
# Benchmarks: weights in few bits

This page is generated from a ledger by the command below; do not edit it. Every row starts from the same float32
network and the same calibration data. The metric is that of the ONNX file over the whole test split (LLM Compressor's
weights are put into the network first), brackets are 95% intervals. *Bits per weight* count integers, scales, zero
points and whatever else is stored of all weights that were quantized. *Trained*: what was left in floats (scales, zero
points, norms, biases, embeddings) learned on the training split, nine tenths of the loss from the float32 network's
outputs and one from the labels, no integer moved; so a trained row may beat the float32 network, which was not.
Seconds are those of the processor, calibration (and training) included, export and judging not.
"""


class Row(Record):
    """One way to quantize: how good, how small, and what it took. One that failed stays, with its reason."""

    name: str
    steps: list[dict[str, Any]]
    bits: int
    state: str = "done"
    reason: str = ""
    bits_per_weight: float = 0.0
    weights: int = 0
    metric: Figure | None = None
    bytes: int = 0
    cpu_seconds: float = 0.0


class Ledger(Record):
    """One run of this benchmark on one task."""

    benchmark: str = "weights"
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
    rows: list[Row]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="zoo:stories260k")
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument(
        "--window", type=int, help="bits of a trellis's window: 8, and whole bits alone, for a large network"
    )
    parser.add_argument("--epochs", type=float, default=2.0, help="of training what is left; 0 leaves it out")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledgers")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-weights.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    parser.add_argument("--peers", type=Path, default=os.environ.get(VARIABLE), help="folder of the environments")
    return parser.parse_args(argv)


def contenders(given: argparse.Namespace) -> Iterator[Row]:
    """Every method at every width, without training, and the two best of ours with it."""
    heal = {"kind": "distill.logits", "epochs": given.epochs, "lr": given.lr, "temperature": 1.0}
    for bits in given.bits:
        plain = {"kind": "quantize.weights", "bits": bits, "group": given.group}
        for method in (each for each in given.methods if each not in ("trellis", "peer")):
            yield Row(name=method, bits=bits, steps=[{**plain, "method": method}])
        if "gptq" in given.methods:
            halves = {**plain, "method": "gptq", "symmetric": True}
            best = halves if bits == 2 else {**plain, "method": "gptq"}
            if bits == 2:
                yield Row(name="gptq, half steps", bits=bits, steps=[halves])
            if given.epochs and bits < 8:
                yield Row(name="gptq, trained", bits=bits, steps=[best, heal])
        if "trellis" in given.methods:
            short = {"window": given.window} if given.window else {}
            for mean in TRELLIS.get(bits, ())[: 1 if short else 2]:
                name = f"trellis {mean:g}" + (f", window of {given.window}" if short else "")
                coded = {"kind": "quantize.trellis", "bits": mean, **short}
                yield Row(name=name, bits=bits, steps=[coded])
                if given.epochs and mean == TRELLIS[bits][-1]:
                    yield Row(name=f"{name}, trained", bits=bits, steps=[coded, heal])
        if "peer" in given.methods:
            for method in ("rtn", "gptq"):
                settings = {"method": method, "bits": bits, "group": given.group, "observer": "mse"}
                yield Row(name=f"{PEER} {method}, searched clipping", bits=bits, steps=[settings])


def judged(task: Task, model: nn.Module, name: str = "onnxruntime") -> tuple[Figure, int]:
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


def made(row: Row, task: Task, seed: int) -> nn.Module:
    """The model after the row's steps; the row gets what they took and what is stored."""
    started = time.process_time()
    model, ctx = task.fresh(), Context(task, seed=seed, device=torch.device("cpu"))
    for settings in row.steps:
        options = {name: value for name, value in settings.items() if name != "kind"}
        model, _ = run_step(step(settings["kind"], **options), model, ctx)
    row.cpu_seconds = time.process_time() - started
    row.weights, row.bits_per_weight = stored(model)
    return model


def stored(model: nn.Module) -> tuple[int, float]:
    """How many weights a model holds in an encoding, and the bits that each takes, all metadata counted."""
    found = list(encodings(model).values())
    weights = sum(math.prod(encoding.shape) for encoding in found)
    return weights, sum(encoding.bits_per_weight() * math.prod(encoding.shape) for encoding in found) / weights


def made_by_peer(row: Row, task: Task, peers: Path | None) -> nn.Module:
    """The model with the peer's rounded weights, from the same calibration data."""
    model, figures = from_peer("weights_llmcompressor.py", row.steps[0], task, peers)
    row.bits_per_weight, row.weights = figures["bits_per_weight"], figures["weights"]
    row.cpu_seconds = figures["cpu_seconds"]
    return model


def from_peer(
    script: str, settings: dict[str, Any], task: Task, peers: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with the weights that a script of the peer gives for the same calibration data, and its figures."""
    options = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = task.fresh()
        inner: Any = next(each for each in model.modules() if hasattr(each, "save_pretrained"))
        inner.save_pretrained(folder / "model")
        tokens = write_calibration(folder / "tokens.npz", sequences(task))
        Peer("llmcompressor", peers).run(script, folder / "model", tokens, folder, *options)
        figures = json.loads((folder / "figures.json").read_text("utf-8"))
        unknown = inner.load_state_dict(load_file(folder / "weights.safetensors"), strict=False).unexpected_keys
    if unknown:
        raise RuntimeError(f"the peer names weights that the model lacks: {', '.join(unknown)}")
    return model, figures


def sequences(task: Task) -> list[dict[str, np.ndarray]]:
    """The token sequences of the calibration data, one by one, without padding."""
    found = []
    for batch in task.batches("calibrate", batch_size=1):  # where there is no mask, one sequence has no padding
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        found += [{"input_ids": row[mask][None].numpy()} for row, mask in zip(batch["input_ids"], real)]
    return found


def fill(row: Row, task: Task, given: argparse.Namespace) -> None:
    """Make the row's model, export and judge it."""
    try:
        ours = "kind" in row.steps[0]
        model = made(row, task, given.seed) if ours else made_by_peer(row, task, given.peers)
    except (NotInstalled, RuntimeError) as error:
        row.state = "not installed" if isinstance(error, NotInstalled) else "failed"
        row.reason = " ".join(str(error).split())[:300]
        return
    row.metric, size = judged(task, model)
    row.bytes = size if ours else 0  # the peer's floats are no file of its own


def page(ledgers: list[Ledger]) -> str:
    """The whole page in Markdown."""
    lines = [PAGE]
    for ledger in ledgers:
        versions = ", ".join(f"{name} {number}" for name, number in ledger.versions.items())
        better = "higher" if ledger.higher_is_better else "lower"
        lines += [f"## {ledger.task}", "", f"* Date: {ledger.date}", f"* Machine: {ledger.machine}"]
        lines += [f"* Versions: {versions}", f"* Command: `{ledger.command}`", "", ledger.notes, ""]
        lines += [
            f"| bits | method | bits per weight | {ledger.metric} ({better} is better) | bytes of the file | seconds |",
            "|---:|---|---:|---:|---:|---:|",
            f"| 32 | float32 | 32 | {text(ledger.original)} | | |",
        ]
        lines += [cells(row) for row in ledger.rows if row.state == "done"]
        failed = [row for row in ledger.rows if row.state != "done"]
        lines += ["", *(f"{row.bits} bits, {row.name}: {row.state}: {row.reason}" for row in failed), ""]
    return "\n".join(lines).rstrip() + "\n"


def cells(row: Row) -> str:
    size = f"{row.bytes:,}" if row.bytes else ""
    assert row.metric is not None
    return (
        f"| {row.bits} | {row.name} | {row.bits_per_weight:.2f} | {text(row.metric)} | {size} | {row.cpu_seconds:.0f} |"
    )


def text(figure: Figure) -> str:
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


def place(given: argparse.Namespace) -> Path:
    name: str = given.task
    return Path(given.out) / f"weights-{name.split(':')[-1]}-{given.date}.json"


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
    return Ledger(
        date=given.date,
        command=command,
        machine=describe(),
        versions=versions,
        seed=given.seed,
        task=given.task,
        metric=task.metric.name,
        higher_is_better=task.metric.higher_is_better,
        notes=f"Groups of {given.group}. {task.notes}",
        original=judged(task, task.original)[0],
        rows=[],
    )


def all_ledgers(out: Path, date: str) -> list[Ledger]:
    """The ledgers of that date, of all tasks."""
    paths = sorted(out.glob(f"weights-*-{date}.json"))
    return [Ledger.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    task = find_task(given.task)
    words = sys.argv[1:] if argv is None else argv
    command = " ".join(["python -m benchmarks.weights", *words]).replace(str(given.peers), "FOLDER")
    ledger = start(given, task, command)
    for row in contenders(given):
        if any(each.steps == row.steps and each.state == "done" for each in ledger.rows):
            continue
        print(f"{row.bits} bits: {row.name}", file=sys.stderr, flush=True)
        fill(row, task, given)
        ledger.rows = [each for each in ledger.rows if each.steps != row.steps] + [row]
        ledger.rows.sort(key=lambda each: (-each.bits, each.name.startswith(PEER), each.name))
        write_text(place(given), ledger.model_dump_json(indent=1) + "\n")
        write_text(given.page, page(all_ledgers(given.out, given.date)))
        print(f"{row.bits} bits: {row.name}: {row.metric or row.reason}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
