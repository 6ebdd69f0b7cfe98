"""The coder of the coded checkpoint on real quantized networks: bits per integer beside their entropy, and its speed.

    python -m benchmarks.coder --date 2026-01-31

Writes the ledger after every row, and the page docs/benchmarks-coder.md. One thread.
"""

from __future__ import annotations

import argparse
import sys
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from featherweight.core.coding import arrays
from featherweight.core.context import Context, run_step
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.step import step
from featherweight.core.task import Task, find_task
from featherweight.model.encoded import lean
from featherweight.model.skeleton import skeleton

from .page import rows_of
from .record import Record

PACKAGES = ("featherweight", "torch", "numpy", "constriction")
NETWORKS = ("zoo:cifar10-resnet20", "zoo:cifar10-resnet56")
STEPS: dict[str, dict[str, Any]] = {
    "int8, a step per row": {"kind": "quantize.weights", "method": "rtn", "bits": 8, "group": None},
    "int4, a step per row": {"kind": "quantize.weights", "method": "rtn", "bits": 4, "group": None},
    "indices into 16 entries": {"kind": "share.codebook", "bits": 4, "importance": "none"},
    "half of the weights zero, int4": {"kind": "quantize.weights", "method": "rtn", "bits": 4, "group": None},
    "quantize.coded, 24 dB": {"kind": "quantize.coded", "snr": 24.0},
}
BEFORE: dict[str, dict[str, Any]] = {"half of the weights zero, int4": {"kind": "prune.weights", "sparsity": 0.5}}
Matrix = NDArray[np.int64]
PAGE = """\
# Benchmarks: the coder

This page is generated from a ledger by the command below; do not edit it. The integers of every weight of a network,
as each step makes them, go through the coder of the coded checkpoint and back. *Entropy* is that of each tensor by its
own frequencies, which a coder would have to be told beside; *bits* are all that ours takes, nothing beside. *Deflate*
is zlib at its best, on one byte for each integer. Speed is in millions of integers (one byte each in memory) for a
second of the processor, the best of all runs, one thread; what comes back is compared.
"""


class Row(Record):
    """The integers of one network as one step makes them; sizes in bits for each, seconds for all, by run."""

    network: str
    name: str
    steps: list[dict[str, Any]]
    tensors: int
    count: int
    entropy: float
    bits: float
    deflate: float
    encode_seconds: list[float]
    decode_seconds: list[float]

    @property
    def over(self) -> float:
        """What the coder takes more than the entropy, as a share of it; below 0 where contexts pay."""
        return self.bits / self.entropy - 1


class Ledger(Record):
    """One run of this benchmark."""

    benchmark: str = "coder"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    rows: list[Row]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-coder.md"))
    return parser.parse_args(argv)


def integers(task: Task, steps: list[dict[str, Any]]) -> list[Matrix]:
    """The integers that stand for the weights after these steps, each tensor as the coder takes it."""
    model, ctx = task.fresh(), Context(task, device=torch.device("cpu"))
    for item in steps:
        model, _ = run_step(step(**item), model, ctx)
    page, tensors = skeleton(lean(model))
    held = [tensors[name] for name in page.own() if name.endswith((".values", ".indices"))]
    whole = [tensor for tensor in held if not tensor.is_floating_point()]
    return [tensor.long().reshape(len(tensor), -1).numpy() for tensor in whole]


def entropy(values: Matrix) -> float:
    """Bits of all entries together, by their own frequencies."""
    counts = np.unique(values, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def measure(network: str, name: str, task: Task, runs: int) -> Row:
    steps = [each for each in (BEFORE.get(name), STEPS[name]) if each is not None]
    found = integers(task, steps)
    count, encode, decode, coded = sum(each.size for each in found), [], [], list[arrays.Coded | None]()
    for _ in range(runs):
        spent, coded = timed(lambda: [arrays.code_integers(each) for each in found])
        encode.append(spent)
        pairs = [(one, each.shape) for one, each in zip(coded, found) if one is not None]
        spent, back = timed(lambda: [arrays.decode_integers(one, shape) for one, shape in pairs])  # noqa: B023
        decode.append(spent)
        if len(back) != len(found) or not all(np.array_equal(a, b) for a, b in zip(back, found)):
            raise RuntimeError(f"{network}, {name}: other integers came back")
    return Row(
        network=network,
        name=name,
        steps=steps,
        tensors=len(found),
        count=count,
        entropy=sum(map(entropy, found)) / count,
        bits=8 * sum(len(each.data) for each in coded if each is not None) / count,
        deflate=8
        * sum(len(zlib.compress(each.astype(np.int16 if wide(each) else np.int8), 9)) for each in found)
        / count,
        encode_seconds=encode,
        decode_seconds=decode,
    )


def wide(values: Matrix) -> bool:
    """Whether a byte does not hold these integers."""
    return bool(values.max() - values.min() > 255)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    versions = ", ".join(f"{name} {text}" for name, text in ledger.versions.items())
    worst = max(ledger.rows, key=lambda row: row.over)
    lines = [PAGE, f"* Date: {ledger.date}", f"* Machine: {ledger.machine}", f"* Versions: {versions}"]
    lines += [f"* Command: `{ledger.command}`", ""]
    lines += [f"Furthest above the entropy: {worst.over:+.2%} ({worst.network}, {worst.name}).", ""]
    head = ["network", "integers", "count", "entropy", "bits", "over", "deflate", "coding (M/s)", "decoding (M/s)"]
    lines += rows_of(head, (cells(row) for row in ledger.rows))
    return "\n".join(lines) + "\n"


def cells(row: Row) -> list[str]:
    speeds = (row.count / min(each) / 1e6 for each in (row.encode_seconds, row.decode_seconds))
    sizes = [f"{row.entropy:.4f}", f"{row.bits:.4f}", f"{row.over:+.2%}", f"{row.deflate:.3f}"]
    return [row.network, row.name, f"{row.count:,}", *sizes, *(f"{speed:.1f}" for speed in speeds)]


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    words = sys.argv[1:] if argv is None else argv
    ledger = Ledger(
        date=given.date,
        command=" ".join(["python -m benchmarks.coder", *words]),
        machine=describe(),
        versions={name: version(name) for name in PACKAGES},
        rows=[],
    )
    for network in given.networks:
        task = find_task(network)
        for name in STEPS:
            ledger.rows.append(measure(network, name, task, given.runs))
            print(cells(ledger.rows[-1]), file=sys.stderr, flush=True)
            write_text(given.out / f"coder-{given.date}.json", ledger.model_dump_json(indent=1) + "\n")
            write_text(given.page, page(ledger))
    return 0


if __name__ == "__main__":
    sys.exit(main())
