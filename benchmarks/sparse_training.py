"""Sparse training from scratch beside static random sparsity, and what training time dropout saves, on one machine.

    python -m benchmarks.sparse_training --date 2026-01-31 --epochs 20 --seeds 0 1 2

Writes the ledger after every row, and the page docs/benchmarks-sparse-training.md. A row that is in the ledger of that
date, with the same settings, is not made again, so a run that was killed goes on. It trains on CUDA where there is one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from featherweight.core.context import Context, run_step
from featherweight.core.errors import FeatherweightError
from featherweight.core.evaluate import records, torch_run
from featherweight.core.files import write_text
from featherweight.core.fit import steps_per_epoch
from featherweight.core.machine import describe
from featherweight.core.step import Step, step
from featherweight.core.task import Task, find_task
from featherweight.measure.statistics import mean_estimate
from featherweight.methods.sparse.scratch import start_anew

from .record import Figure, Record
from .sparse_training_page import page

PACKAGES = ("featherweight", "torch")
SPARSE = ("dense", "static", "set", "rigl")
KINDS = {"static": "sparse.set", "set": "sparse.set", "rigl": "sparse.rigl"}
ORDINARY = "ordinary"
WAYS: dict[str, dict[str, Any]] = {
    ORDINARY: {"kind": "finetune"},
    "LayerDrop 0.2": {"kind": "sparse.layerdrop", "rate": 0.2},
    "LayerDrop 0.5": {"kind": "sparse.layerdrop", "rate": 0.5},
    "stochastic depth 0.5": {"kind": "sparse.stochastic_depth", "rate": 0.5},
    "structured dropout 0.5": {"kind": "sparse.structured_dropout", "rate": 0.5},
}


class Trained(Record):
    """One network trained from scratch: how, how sparse, and how good."""

    contender: str
    seed: int
    step: dict[str, Any]
    zeros: float
    accuracy: Figure
    validation: float
    seconds: float
    cpu_seconds: float
    device: str


class Timed(Record):
    """One way of training, timed in turn with the others: seconds of an epoch, and how many times faster by round."""

    task: str
    way: str
    step: dict[str, Any]
    state: str = "done"
    reason: str = ""
    clock: str
    steps: int
    steps_per_epoch: int
    seconds: list[float] = []  # of each round, for `steps` steps
    epoch: Figure | None = None
    faster: Figure | None = None


class Ledger(Record):
    """One run of this benchmark."""

    benchmark: str = "sparse-training"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    task: str
    notes: str
    sparsity: float
    trained: list[Trained] = []
    timed: list[Timed] = []


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_training", description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="zoo:cifar10-resnet20", help="network that is trained from scratch")
    parser.add_argument("--timed", nargs="*", default=["zoo:cifar10-resnet20", "zoo:stsb-minilm"])
    parser.add_argument("--contenders", nargs="*", default=list(SPARSE), choices=list(SPARSE))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--epochs", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, help="budget of each training instead of --epochs, in dense training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the training")
    parser.add_argument("--interval", type=int, default=100, help="optimizer steps between exchanges")
    parser.add_argument("--fraction", type=float, default=0.3, help="of the connections that the first exchange moves")
    parser.add_argument("--rounds", type=int, default=7, help="of timing, all ways in turn")
    parser.add_argument("--steps", type=int, default=20, help="that each way trains for in a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-sparse-training.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


# -- accuracy ---------------------------------------------------------------------------------------------------------
def training_step(contender: str, given: argparse.Namespace) -> Step:
    """The step that trains one contender; all train alike but for what is sparse."""
    alike = {"epochs": given.epochs, "lr": given.lr, "optimizer": "sgd", "weight_decay": 5e-4}
    alike |= {"precision": given.precision}
    if contender == "dense":
        return step("finetune", **alike)
    fraction = 0.0 if contender == "static" else given.fraction
    sparse = {"sparsity": given.sparsity, "start": "scratch", "fraction": fraction, "interval": given.interval}
    return step(KINDS[contender], **alike, **sparse)


def trained(contender: str, seed: int, task: Task, given: argparse.Namespace) -> Trained:
    """Train one contender from scratch and judge it on the whole test split."""
    item, ctx = training_step(contender, given), Context(task, seed=seed, device=torch.device(given.device))
    model = task.fresh()
    torch.manual_seed(seed)
    start_anew(model)
    cpu, wall = time.process_time(), time.perf_counter()
    model, _ = run_step(item, model, ctx)
    took = time.perf_counter() - wall, time.process_time() - cpu
    found = records(task, torch_run(task, model, given.device))
    weights = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    return Trained(
        contender=contender,
        seed=seed,
        step=item.full(),
        zeros=sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights),
        accuracy=figure(task.metric.reduce(found), *task.metric.interval(found), len(found)),
        validation=task.metric.reduce(records(task, torch_run(task, model, given.device), "validate")),
        seconds=took[0],
        cpu_seconds=took[1],
        device=given.device,
    )


# -- time -------------------------------------------------------------------------------------------------------------
@dataclass
class Clocked(Context):
    """A context that knows how long its trainings took, in seconds of `clock`."""

    clock: Callable[[], float] = time.perf_counter
    took: float = 0.0

    def fit(self, *given: Any, **named: Any) -> float:
        start = self.clock()
        loss = super().fit(*given, **named)
        self.took += self.clock() - start
        return loss


def clock_of(device: str) -> tuple[str, Callable[[], float]]:
    """Time of the processor, which leaves out what else a busy machine does; wall time where a GPU computes."""
    if device == "cpu":
        return "seconds of the processor", time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return "seconds", wall


def once(way: str, task: Task, steps: int, given: argparse.Namespace, seed: int = 0) -> float:
    """Seconds of the clock that `steps` steps of one way take; what is found out before the training does not count."""
    ctx = Clocked(task, seed=seed, device=torch.device(given.device), clock=clock_of(given.device)[1])
    run_step(timed_step(way, task, steps), task.fresh(), ctx)
    return ctx.took


def timed_step(way: str, task: Task, steps: int) -> Step:
    per_epoch = steps_per_epoch(Context(task), task.batch_size)
    return step(**WAYS[way], epochs=steps / per_epoch, lr=1e-4)


def timed(name: str, given: argparse.Namespace) -> list[Timed]:
    """Every way of training one network, in turn, round after round; the first round warms up and does not count."""
    task = find_task(name)
    per_epoch = steps_per_epoch(Context(task), task.batch_size)
    rows = [
        Timed(
            task=name,
            way=way,
            step=timed_step(way, task, given.steps).full(),
            clock=clock_of(given.device)[0],
            steps=given.steps,
            steps_per_epoch=per_epoch,
        )
        for way in WAYS
    ]
    for turn in range(given.rounds + 1):
        for row in rows:
            if row.state == "done":
                _round(row, task, turn, given)
        print(f"{name}: round {turn} of {given.rounds}", file=sys.stderr, flush=True)
    ordinary = rows[0].seconds
    for row in rows:
        if row.state == "done":
            row.epoch = figure(*mean_estimate([each / row.steps * per_epoch for each in row.seconds]), given.rounds)
            row.faster = figure(*mean_estimate([a / b for a, b in zip(ordinary, row.seconds)]), given.rounds)
    return rows


def _round(row: Timed, task: Task, turn: int, given: argparse.Namespace) -> None:
    """One round of one way; a way that the network does not allow stays in the ledger with its reason."""
    try:
        took = once(row.way, task, max(2, given.steps // 4) if turn == 0 else given.steps, given, seed=turn)
    except FeatherweightError as error:
        row.state, row.reason = "refused", str(error)
        return
    if turn:
        row.seconds.append(took)


def figure(value: float, low: float, high: float, count: int) -> Figure:
    return Figure(value=value, low=low, high=high, n=count)


# -- the run ----------------------------------------------------------------------------------------------------------
def started(given: argparse.Namespace, task: Task, argv: list[str]) -> tuple[Ledger, Path]:
    """The ledger of this date, from the file if it lies there."""
    path = given.out / f"sparse-training-{given.date}.json"
    before = Ledger.model_validate_json(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before and (before.task, before.sparsity) != (given.task, given.sparsity):
        raise SystemExit(f"{path} has another task or sparsity; take another --date or --out")
    commands = before.command.split("; ") if before else []
    commands.append("python -m benchmarks.sparse_training " + " ".join(argv))
    ledger = Ledger(
        date=given.date,
        command="; ".join(dict.fromkeys(commands)),
        machine=describe() if given.device == "cpu" else f"{describe()}, {torch.cuda.get_device_name()}",
        versions={name: version(name) for name in PACKAGES},
        task=given.task,
        notes=task.notes,
        sparsity=given.sparsity,
        trained=before.trained if before else [],
        timed=before.timed if before else [],
    )
    return ledger, path


def keep(ledger: Ledger, path: Path, given: argparse.Namespace) -> None:
    write_text(path, ledger.model_dump_json(indent=1) + "\n")
    write_text(given.page, page(ledger))


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    task = find_task(given.task)
    if given.seconds:
        steps = given.seconds / (once(ORDINARY, task, given.steps, given) / given.steps)
        given.epochs = round(steps / steps_per_epoch(Context(task), task.batch_size), 2)
    ledger, path = started(given, task, sys.argv[1:] if argv is None else argv)
    for name in given.timed:
        if not any(row.task == name for row in ledger.timed):
            ledger = ledger.model_copy(update={"timed": [*ledger.timed, *timed(name, given)]})
            keep(ledger, path, given)
    for seed in given.seeds:
        for contender in given.contenders:
            wanted = training_step(contender, given).full()
            if any((row.step, row.seed, row.contender) == (wanted, seed, contender) for row in ledger.trained):
                continue
            row = trained(contender, seed, replace(task), given)
            print(f"{contender}, seed {seed}: {row.accuracy.value:.2f}", file=sys.stderr, flush=True)
            ledger = ledger.model_copy(update={"trained": [*ledger.trained, row]})
            keep(ledger, path, given)
    print(f"ledger: {path}\npage:   {given.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
