"""LeNet-300-100 and LeNet-5 on MNIST, from training to the coded file: error and size over five seeds.

    FEATHERWEIGHT_DATA=... python -m benchmarks.lenet --date 2026-01-31

Each network is trained from scratch, and made small by one recipe at several prices for a bit. What is judged is the
artifact of the target `coded`, on all 10,000 test images. Writes the ledger after every row, and the page
docs/benchmarks-lenet.md with its curve. A row that is in the ledger of that date is not made again. One thread.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.evaluate import records, torch_figure
from featherweight.core.files import write_text
from featherweight.core.fit import Training
from featherweight.core.machine import describe
from featherweight.core.recipe import Recipe
from featherweight.core.soft import copied, encodings
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.zoo import mnist

from .lenet_page import curve, page
from .lenet_record import Ledger, Row

PACKAGES = ("featherweight", "torch", "numpy", "constriction")
DENSE = "dense"


@dataclass(frozen=True)
class Study:
    """One network: how it is trained, which steps go before, and how its weights are trained at each price of a bit."""

    make: Any
    training: Training
    reach: int
    before: tuple[dict[str, Any], ...]
    priced: dict[str, Any]
    rates: tuple[float, ...]

    def recipes(self) -> Iterator[tuple[str, Recipe]]:
        """The name and the steps of every row; the first steps are the same."""
        for rate in self.rates:
            yield f"rate {rate:g}", Recipe([*self.before, {**self.priced, "rate": rate}])


def training(**given: Any) -> dict[str, Any]:
    return {"batch_size": 128, **given}


STUDIES = {
    "lenet-300-100": Study(
        make=mnist.lenet300,
        training=Training(**training(epochs=6, lr=2e-3, weight_decay=1e-2)),
        reach=1,
        before=(),
        priced={"kind": "quantize.entropy", **training(epochs=10, lr=3e-3), "coarse": 1.5, "digits": 4},
        rates=(0.1, 0.2, 0.4),
    ),
    "lenet-5": Study(
        make=mnist.lenet5,
        training=Training(**training(epochs=3, lr=2e-3, weight_decay=1e-2)),
        reach=2,
        before=(
            {
                "kind": "prune.structured",
                "keep": 0.12,
                "of": "macs",
                "score": "taylor",
                "rounds": 3,
                "min_keep": 0.04,
                "retrain": training(epochs=0.7, lr=2e-3, weight_decay=1e-3),
            },
        ),
        priced={"kind": "quantize.entropy", **training(epochs=10, lr=3e-3), "digits": 4},
        rates=(0.1, 0.3, 0.8),
    ),
}


class Seeded:
    """One network trained with one seed: its task, and the models after the steps that come before the last."""

    def __init__(self, name: str, seed: int):
        self.name, self.seed, self.study = name, seed, STUDIES[name]
        study = self.study
        self.task: Task = mnist.task(f"mnist-{name}", study.make, study.training, study.reach, seed)
        self.before_seconds = 0.0

    def context(self) -> Context:
        return Context(self.task, seed=self.seed, device=torch.device("cpu"))

    @cached_property
    def before(self) -> nn.Module:
        """The model after the steps that all recipes begin with."""
        started, model = time.process_time(), self.task.fresh()
        for item in Recipe(self.study.before).steps:
            model, _ = run_step(item, model, self.context())
        self.before_seconds = time.process_time() - started
        return model

    def compressed(self, recipe: Recipe) -> tuple[nn.Module, float]:
        """The model after the whole recipe, and the seconds of the processor for all of its steps."""
        model, started = copied(self.before), time.process_time()
        model, _ = run_step(recipe.steps[-1], model, self.context())
        return model, self.before_seconds + time.process_time() - started


def dense(seeded: Seeded) -> Row:
    """The network as it was trained, in float32."""
    task, started = seeded.task, time.process_time()
    parameters = sum(each.numel() for each in task.original.parameters())
    seconds = time.process_time() - started
    validation, test = (100 - torch_figure(task, None, split) for split in ("validate", "test"))
    return Row(
        network=seeded.name,
        seed=seeded.seed,
        name=DENSE,
        steps=[],
        validation_error=validation,
        test_error=test,
        inputs=sum(task.count(batch) for batch in task.batches("test")),
        bytes=4 * parameters,
        parameters=parameters,
        weights=parameters,
        seconds=seconds,
    )


def compressed(seeded: Seeded, name: str, recipe: Recipe) -> Row:
    """One row: the artifact of one recipe, judged as it is read back from its file."""
    model, seconds = seeded.compressed(recipe)
    task = seeded.task
    with tempfile.TemporaryDirectory() as folder:
        free = {each: task.free(each) for each in task.example}
        artifact = target("coded").export(model, task.example, Path(folder) / "made", free=free)
        runner = artifact.open()
        validate, test = (records(task, lambda batch: task.call(runner, batch), split) for split in SPLITS)
        size = (Path(folder) / "made" / "model.fwc").stat().st_size
    return Row(
        network=seeded.name,
        seed=seeded.seed,
        name=name,
        steps=recipe.dump()["steps"],
        validation_error=100 - task.metric.reduce(validate),
        test_error=100 - task.metric.reduce(test),
        inputs=len(test),
        bytes=size,
        parameters=sum(each.numel() for each in task.original.parameters()),
        weights=sum(int((each.decode() != 0).sum()) for each in encodings(model).values()),
        seconds=seconds,
    )


SPLITS = ("validate", "test")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lenet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledgers")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-lenet.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


def start(given: argparse.Namespace, path: Path, command: str) -> Ledger:
    """The ledger of that date if there is one, else a new one."""
    if path.is_file():
        found = Ledger.model_validate_json(path.read_text(encoding="utf-8"))
        if command not in found.command.split("; "):
            found.command += f"; {command}"
        return found
    versions = {name: version(name) for name in PACKAGES}
    return Ledger(date=given.date, command=command, machine=describe(), versions=versions, rows=[])


def rows(seeded: Seeded, ledger: Ledger) -> Iterator[Row]:
    """The rows of one network and seed that the ledger lacks."""
    known = [(row.name, row.steps) for row in ledger.rows if (row.network, row.seed) == (seeded.name, seeded.seed)]
    if (DENSE, []) not in known:
        yield dense(seeded)
    for name, recipe in seeded.study.recipes():
        if (name, recipe.dump()["steps"]) not in known:
            yield compressed(seeded, name, recipe)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    path = given.out / f"lenet-{given.date}.json"
    words = sys.argv[1:] if argv is None else argv
    ledger = start(given, path, " ".join(["python -m benchmarks.lenet", *words]))
    for seed in given.seeds:
        for network in given.networks:
            for row in rows(Seeded(network, seed), ledger):
                ledger.add(row)
                write_text(path, ledger.model_dump_json(indent=1) + "\n")
                write_text(given.page, page(ledger, given.page.with_suffix(".svg").name))
                write_text(given.page.with_suffix(".svg"), curve(ledger))
                print(
                    f"{row.network} seed {row.seed} {row.name}: {row.test_error:.2f}% in {row.bytes:,} bytes, "
                    f"{row.smaller:.0f}x, {row.seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
