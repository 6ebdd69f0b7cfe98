"""GPTQ of one linear layer beside LLM Compressor's: time, peak memory and error, each in a process of its own.

    python -m benchmarks.gptq --date 2026-01-31 --peers FOLDER

Writes the ledger and the page docs/benchmarks-gptq.md. Both get the same files with the weight (as `nn.Linear` starts)
and the inputs (Gaussian); the runs of all contenders alternate. What a peer lacks is said on the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from featherweight.core.files import write_text
from featherweight.core.machine import describe

from .page import rows_of
from .peers import VARIABLE, NotInstalled, Peer
from .record import Record

ROOT = Path(__file__).parent.parent
PACKAGES = ("featherweight", "torch")
OURS: dict[str, dict[str, Any]] = {
    "featherweight, plain": {"clipping": False, "beam": 1, "refine": 0},
    "featherweight, scales fitted once": {"clipping": False, "beam": 1, "refine": 1},
    "featherweight, as it comes": {},
}
THEIRS = {"LLM Compressor": "minmax", "LLM Compressor, searched clipping": "mse"}
Run = Callable[[Path, Path], None]  # of a folder with the data and one for the result
PAGE = """\
# Benchmarks: GPTQ of one layer

This page is generated from a ledger by the command below; do not edit it. One linear layer, affine integers in groups,
large inputs first (ours by sorted QR), the same weight and inputs for all. Each run is a process of its own, and the
runs of all contenders alternate. *Error* is that of the layer's outputs on these inputs, relative to their norm. Time
is from the float layer to the rounded weight, calibration included; *seconds of the processor* do not count what else
the machine does meanwhile. *Peak* is the most memory that the process held, of which *before* is what libraries, weight
and inputs took. Times are the least, memory the most of all runs.
"""


class Row(Record):
    """One contender; `state` and `reason` as in `record.Row`."""

    contender: str
    state: str = "done"
    reason: str = ""
    settings: dict[str, Any]
    error: float | None = None
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    start_mib: list[float] = []
    peak_mib: list[float] = []


class Ledger(Record):
    """One run of this benchmark."""

    benchmark: str = "gptq"
    date: str
    command: str
    machine: str
    load: float
    versions: dict[str, str]
    rows_of_weight: int
    columns: int
    inputs: int
    bits: int
    group: int
    threads: int
    seed: int
    to_nearest: float
    rows: list[Row]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gptq", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the weight")
    parser.add_argument("--inputs", type=int, default=512, help="rows of calibration data")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-gptq.md"))
    parser.add_argument("--peers", type=Path, default=os.environ.get(VARIABLE), help="folder of the environments")
    return parser.parse_args(argv)


def write_data(folder: Path, given: argparse.Namespace) -> None:
    """A weight as `nn.Linear` draws it, and Gaussian inputs."""
    torch.manual_seed(given.seed)
    np.save(folder / "weight.npy", nn.Linear(given.size, given.size, bias=False).weight.detach().numpy())
    np.save(folder / "inputs.npy", torch.randn(given.inputs, given.size).numpy())


def contenders(given: argparse.Namespace) -> dict[str, tuple[dict[str, Any], Run]]:
    """By name: the settings, and what runs it in a process of its own."""
    found: dict[str, tuple[dict[str, Any], Run]] = {}
    for name, settings in OURS.items():
        item = {"kind": "quantize.weights", "method": "gptq", "bits": given.bits, "group": given.group, **settings}
        found[name] = (item, partial(run_ours, item, given.threads))
    for name, observer in THEIRS.items():
        options = {"bits": given.bits, "group": given.group, "threads": given.threads, "observer": observer}
        found[name] = (options, partial(run_theirs, Peer("llmcompressor", given.peers), options))
    return found


def run_ours(item: dict[str, Any], threads: int, data: Path, out: Path) -> None:
    words = ["-m", "benchmarks.gptq_layer", data, out, "--threads", threads, "--step", json.dumps(item)]
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])


def run_theirs(peer: Peer, options: dict[str, Any], data: Path, out: Path) -> None:
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    peer.run("gptq_llmcompressor.py", data, out, *words)


def attempt(row: Row, run: Run, data: Path) -> None:
    """Run one contender once more, and add the figures to its row."""
    if row.state != "done":
        return
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        try:
            run(data, out)
        except NotInstalled as missing:
            row.state, row.reason = "not installed", str(missing)
            return
        except RuntimeError as error:
            row.state, row.reason = "failed", " ".join(str(error).split())[:300]
            return
        for key, value in json.loads((out / "figures.json").read_text("utf-8")).items():
            getattr(row, key).append(round(value, 3))
        row.error = error_of(data, np.load(out / "weight.npy"))


def error_of(data: Path, rounded: np.ndarray) -> float:
    """The norm of the change of the layer's outputs on its inputs, relative to that of the outputs."""
    weight, inputs = (np.load(data / name).astype(np.float64) for name in ("weight.npy", "inputs.npy"))
    change = inputs @ (rounded.astype(np.float64) - weight).T
    return float(np.linalg.norm(change) / np.linalg.norm(inputs @ weight.T))


def nearest(weight: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Every weight rounded to the nearest point of the affine grid over its group's range."""
    grouped = weight.reshape(len(weight), -1, group)
    low, high = grouped.min(-1, keepdims=True).clip(max=0), grouped.max(-1, keepdims=True).clip(min=0)
    scale = (high - low) / (2**bits - 1)
    zero = np.round(-low / scale)
    return ((np.round(grouped / scale + zero).clip(0, 2**bits - 1) - zero) * scale).reshape(weight.shape)


def command(given: argparse.Namespace) -> str:
    """The command that gives these figures, without the folders of this machine."""
    sizes = " ".join(
        f"--{name} {getattr(given, name)}" for name in ("size", "inputs", "bits", "group", "threads", "runs")
    )
    return f"python -m benchmarks.gptq --date {given.date} {sizes} --seed {given.seed} --peers FOLDER"


def measure(given: argparse.Namespace) -> Ledger:
    """Run all contenders in turn, `runs` times."""
    entrants = contenders(given)
    rows = {name: Row(contender=name, settings=settings) for name, (settings, _) in entrants.items()}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        write_data(data, given)
        to_nearest = error_of(data, nearest(np.load(data / "weight.npy"), given.bits, given.group))
        for turn in range(given.runs):
            for entrant, (_, run) in entrants.items():
                print(f"run {turn + 1} of {given.runs}: {entrant}", file=sys.stderr, flush=True)
                attempt(rows[entrant], run, data)
    versions = {name: version(name) for name in PACKAGES}
    try:
        versions |= {f"{name} (peer)": text for name, text in Peer("llmcompressor", given.peers).versions().items()}
    except NotInstalled as missing:
        print(missing, file=sys.stderr)
    return Ledger(
        date=given.date,
        command=command(given),
        machine=describe(),
        load=load,
        versions=versions,
        rows_of_weight=given.size,
        columns=given.size,
        inputs=given.inputs,
        bits=given.bits,
        group=given.group,
        threads=given.threads,
        seed=given.seed,
        to_nearest=to_nearest,
        rows=list(rows.values()),
    )


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    about = [
        f"* Date: {ledger.date}",
        f"* Machine: {ledger.machine}; {ledger.threads} thread; load average at the start {ledger.load:.1f}",
        f"* Versions: {', '.join(f'{name} {text}' for name, text in ledger.versions.items())}",
        f"* Command: `{ledger.command}`",
        f"* Layer: {ledger.rows_of_weight} x {ledger.columns}, {ledger.inputs} calibration rows, {ledger.bits} bits, "
        f"groups of {ledger.group}; rounded to nearest its error is {ledger.to_nearest:.5f}",
        "",
    ]
    head = ["contender", "error", "seconds", "seconds of the processor", "peak (MiB)", "before (MiB)", "added (MiB)"]
    done = [row for row in ledger.rows if row.state == "done"]
    lines = [PAGE, *about, *rows_of(head, (cells(row) for row in done))]
    for row in ledger.rows:
        if row.state != "done":
            lines += ["", f"{row.contender} {'failed' if row.state == 'failed' else f'is {row.state}'}: {row.reason}"]
    lines += ["", "Settings:", "", *(f"* **{row.contender}**: `{json.dumps(row.settings)}`" for row in ledger.rows)]
    return "\n".join(lines) + "\n"


def cells(row: Row) -> list[str]:
    added = [f"{after - before:.0f}" for before, after in zip(row.start_mib, row.peak_mib)]
    return [
        row.contender,
        f"{row.error:.5f}",
        f"{min(row.seconds):.1f}",
        f"{min(row.cpu_seconds):.1f}",
        f"{max(row.peak_mib):.0f}",
        f"{max(row.start_mib):.0f}" if added else "not measured",
        max(added, key=float, default="not measured"),
    ]


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    ledger = measure(given)
    path = given.out / f"gptq-{given.date}.json"
    write_text(path, ledger.model_dump_json(indent=1) + "\n")
    write_text(given.page, page(ledger))
    print(f"ledger: {path}\npage:   {given.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
