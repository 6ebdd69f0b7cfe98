"""Experts made of dense feed-forwards, experts of a Mixtral layout, and what they take in the runtime.

    python -m benchmarks.experts --date 2026-01-31 --task zoo:stories260k --parts dense mixture time

Writes the ledger after every row, and the page docs/benchmarks-experts.md. A row that is in the ledger of that date and
task is not made again, so a run that was killed goes on. One thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from featherweight.core.context import Context, run_step
from featherweight.core.evaluate import records
from featherweight.core.files import write_text
from featherweight.core.fit import Training
from featherweight.core.machine import describe
from featherweight.core.step import step
from featherweight.core.target import Artifact, target
from featherweight.core.task import Task, find_task
from featherweight.methods.experts.parts import part
from featherweight.model.experts import FeedForward, Router, experts_of, feed_forward, mixture
from featherweight.model.feedforwards import feed_forwards, put_in

from .compare import CLOCKS, Material, figure, race
from .experts_page import Ledger, Row, page
from .record import Figure
from .verdict import ORIGINAL
from .weights import free

PACKAGES = ("featherweight", "torch", "onnxruntime", "transformers")
PARTS = ("dense", "mixture", "time")
NEURONS = {"kind": "neurons of least magnitude"}  # no step: the baseline at equal compute, made here
CHOICES, COUNTS = (1, 2, 4, 8, 16, 32, 64), (4, 8, 16, 32, 64)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", default="zoo:stories260k")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.5, 0.25], help="shares of the feed-forwards' work")
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 43], help="that a feed-forward is cut into")
    parser.add_argument("--epochs", type=float, default=2.0, help="of healing; 0 leaves it out")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--pretrain", type=float, default=8.0, help="epochs of the tiny Mixtral")
    parser.add_argument("--width", type=int, default=256, help="of the layers that are timed; 64 experts of half of it")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 128])
    parser.add_argument("--timing", type=float, default=2.0, help="seconds, for each file")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: where other work keeps it busy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledgers")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-experts.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


# -- which rows -------------------------------------------------------------------------------------------------------
def rows_of(given: argparse.Namespace) -> Iterator[Row]:
    """All rows of the parts that are asked for."""
    if "dense" in given.parts:
        yield from _dense(given)
    if "mixture" in given.parts:
        yield from _mixture()
    if "time" in given.parts:
        for tokens in given.tokens:
            for top_k in CHOICES:
                yield _timed(64, top_k, tokens)
            for experts in COUNTS[:-1]:
                yield _timed(experts, 2, tokens)


def _dense(given: argparse.Namespace) -> Iterator[Row]:
    heal = {"kind": "distill.logits", "epochs": given.epochs, "lr": given.lr}
    for keep in given.keeps:
        ways: dict[str, dict[str, Any]] = {"neurons pruned by magnitude": {**NEURONS, "keep": keep}}
        for experts in given.experts:
            split = {"kind": "experts.split", "experts": experts, "keep": keep}
            ways[f"{experts} experts"] = split
            if experts * keep >= 2:
                ways[f"{experts} experts, one shared"] = {**split, "shared": 1}
        ways[f"{given.experts[0]} experts by weights"] = {
            "kind": "experts.split", "experts": given.experts[0], "keep": keep, "by": "weights",
        }  # fmt: skip
        for name, settings in ways.items():
            yield Row(part="dense", name=f"{keep:.0%}: {name}", steps=[settings])
            if given.epochs:
                yield Row(part="dense", name=f"{keep:.0%}: {name}, healed", steps=[settings, heal])


def _mixture() -> Iterator[Row]:
    opened = {"kind": "experts.route"}
    four = {"kind": "quantize.weights", "bits": 4}
    ways: dict[str, list[dict[str, Any]]] = {
        "8 experts, 2 a token": [opened],
        "8 experts, 1 a token": [{**opened, "top_k": 1}],
        "merged to 4": [{"kind": "experts.merge", "keep": 0.5}],
        "merged to 4 by the router": [{"kind": "experts.merge", "keep": 0.5, "by": "router"}],
        "pruned to 4 by contribution": [{"kind": "experts.prune", "keep": 0.5}],
        "pruned to 4 by use": [{"kind": "experts.prune", "keep": 0.5, "score": "usage"}],
        "4 bits": [opened, four],
        "merged to 4, 4 bits": [{"kind": "experts.merge", "keep": 0.5}, four],
        "pruned to 4, half of the weights pruned, 4 bits": [
            {"kind": "experts.prune", "keep": 0.5}, {"kind": "prune.weights", "score": "wanda"}, four,
        ],
    }  # fmt: skip
    for name, steps in ways.items():
        yield Row(part="mixture", name=name, steps=steps)


def _timed(experts: int, top_k: int, tokens: int) -> Row:
    settings = {"kind": "a layer", "experts": experts, "top_k": top_k, "tokens": tokens}
    return Row(part="time", name=f"{top_k} of {experts}, {tokens} tokens", steps=[settings])


# -- what the rows are made of ----------------------------------------------------------------------------------------
def tiny_mixtral(task: Task, given: argparse.Namespace) -> Task:
    """The task with a small network of the Mixtral layout, built from a configuration of transformers and trained
    here: two layers of 8 experts, 2 of them a token.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    vocabulary = int(next(m for m in task.original.modules() if isinstance(m, nn.Embedding)).num_embeddings)
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
        output_router_logits=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(given.seed)
    model = MixtralForCausalLM(config)
    made = replace(task, name="tiny-mixtral", model=model)
    Context(made, seed=given.seed, device=torch.device("cpu")).fit(model, Training(epochs=given.pretrain, lr=3e-3))
    return replace(made, model=model.eval())


def without_neurons(model: nn.Module, ctx: Context, keep: float) -> nn.Module:
    """`model` with that share of the neurons of each feed-forward: those whose weights, in and out, are largest."""
    found, _ = feed_forwards(model, ctx)
    for each in found:
        whole: FeedForward = each.parts
        size = whole.down.weight.norm(dim=0) * whole.up.weight.norm(dim=1)
        if whole.gate is not None:
            size = size * whole.gate.weight.norm(dim=1)
        kept = size.argsort(descending=True)[: round(keep * len(size))].sort().values
        model = put_in(model, each, part(whole, kept, whole.down.bias))
    return model


def timed_layer(settings: dict[str, Any], width: int, seed: int) -> nn.Module:
    """A layer of experts of half its width in neurons, with random weights."""
    torch.manual_seed(seed)
    members = [
        feed_forward(
            nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, width), nn.Linear(width, width // 2)
        )
        for _ in range(settings["experts"])
    ]
    router = Router(width, settings["experts"], settings["top_k"])
    nn.init.normal_(router.weight, std=1.0)
    return mixture(router, experts_of(members)).eval()


class Bench:
    """The tasks and the originals' files, which every other is judged and timed beside."""

    def __init__(self, task: Task, given: argparse.Namespace, folder: Path):
        self.task, self.given, self.folder = task, given, folder
        self.tasks: dict[str, tuple[Task, Artifact]] = {}

    def of(self, part: str) -> tuple[Task, Artifact]:
        """The task of a part, and the file of its network."""
        if part not in self.tasks:
            task = tiny_mixtral(self.task, self.given) if part == "mixture" else self.task
            self.tasks[part] = task, self.export(task, task.original)
        return self.tasks[part]

    def export(self, task: Task, model: nn.Module) -> Artifact:
        place = self.folder / str(len(list(self.folder.iterdir())))
        return target("onnxruntime").export(model, task.example, place, free=free(task), bound=1.0)

    def judged(self, task: Task, artifact: Artifact) -> Figure:
        found = records(task, partial(task.call, artifact.open()))
        return figure(task.metric.reduce(found), task.metric.interval(found), len(found))

    def fill(self, row: Row) -> None:
        """Make the row's model, export it, judge its file and time it."""
        if row.part == "time":
            self._time(row)
            return
        task, original = self.of(row.part)
        artifact = self.export(task, self._made(row, task))
        row.metric, row.bytes, row.macs = self.judged(task, artifact), artifact.bytes(), artifact.manifest.work.macs
        self._race(row, task, original, artifact, 1)

    def _made(self, row: Row, task: Task) -> nn.Module:
        started = time.process_time()
        model, ctx = task.fresh(), Context(task, seed=self.given.seed, device=torch.device("cpu"))
        for settings in row.steps:
            options = {name: value for name, value in settings.items() if name != "kind"}
            if settings["kind"] == NEURONS["kind"]:
                model = without_neurons(model, ctx, **options)
                continue
            model, record = run_step(step(settings["kind"], **options), model, ctx)
            row.coverage |= {name: how for name, how in record.changed.items() if name.endswith("(coverage)")}
        row.cpu_seconds = time.process_time() - started
        return model

    def _time(self, row: Row) -> None:
        """The layer against one that computes all of its experts' neurons for every token."""
        settings, width = row.steps[0], self.given.width
        tokens, all_neurons = settings["tokens"], settings["experts"] * (width // 2)
        x = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(self.given.seed))
        task = replace(self.task, name="layer", model=nn.Identity(), calibrate=[(x,)], dynamic={"x": {0: "batch"}})
        dense = feed_forward(
            nn.Linear(width, all_neurons), nn.SiLU(), nn.Linear(all_neurons, width), nn.Linear(width, all_neurons)
        )
        artifacts = []
        for place, model in enumerate((dense.eval(), timed_layer(settings, width, self.given.seed))):
            folder = self.folder / f"{row.name}-{place}"
            artifacts.append(target("onnxruntime").export(model, {"x": x}, folder, bound=1.0))
        row.macs, row.bytes = artifacts[1].manifest.work.macs, artifacts[1].bytes()
        row.dense_macs = artifacts[0].manifest.work.macs
        self._race(row, task, *artifacts, 1)

    def _race(self, row: Row, task: Task, original: Artifact, artifact: Artifact, batch: int) -> None:
        material = Material(task, original, [], self.folder, self.given.seed, clock=self.given.clock)
        files = {ORIGINAL: original.file, "own": artifact.file}
        row.timing = race(task, material, files, batch, self.given.timing)["own"]


# -- the run ----------------------------------------------------------------------------------------------------------
def place(given: argparse.Namespace) -> Path:
    name: str = given.task
    return Path(given.out) / f"experts-{name.split(':')[-1]}-{given.date}.json"


def start(given: argparse.Namespace, bench: Bench, command: str) -> Ledger:
    """The ledger of that date and task if there is one, else a new one."""
    if place(given).is_file():
        found = Ledger.model_validate_json(place(given).read_text(encoding="utf-8"))
        if found.seed != given.seed:
            raise SystemExit(f"{place(given)} has the seed {found.seed}; take another --date or --out for {given.seed}")
        if command not in found.command.split("; "):
            found.command += f"; {command}"
        return found
    task, original = bench.of("dense")
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
        notes=task.notes,
        original=bench.judged(task, original),
        macs=original.manifest.work.macs,
        bytes=original.bytes(),
        rows=[],
    )


def all_ledgers(out: Path, date: str) -> list[Ledger]:
    """The ledgers of that date, of all tasks."""
    paths = sorted(out.glob(f"experts-*-{date}.json"))
    return [Ledger.model_validate_json(path.read_text(encoding="utf-8")) for path in paths]


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    task = find_task(given.task)
    command = " ".join(["python -m benchmarks.experts", *(sys.argv[1:] if argv is None else argv)])
    with TemporaryDirectory() as folder:
        bench = Bench(task, given, Path(folder))
        ledger = start(given, bench, command)
        for row in rows_of(given):
            if any(each.part == row.part and each.steps == row.steps for each in ledger.rows):
                continue
            print(row.name, file=sys.stderr, flush=True)
            bench.fill(row)
            ledger.rows = [each for each in ledger.rows if (each.part, each.name) != (row.part, row.name)] + [row]
            write_text(place(given), ledger.model_dump_json(indent=1) + "\n")
            write_text(given.page, page(all_ledgers(given.out, given.date)))
            print(f"{row.name}: {row.metric or row.timing}", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
