"""ResNet-56 with fewer multiply-accumulates, trained again within a budget, beside Torch-Pruning in the same run.

    python -m benchmarks.structured --date 2026-01-31 --seconds 1800 --threads 2 --peers FOLDER

Writes the ledger and the page docs/benchmarks-structured.md. Each side has the same budget for pruning and training,
the same data, augmentation, loss and schedule; then each gets our int8. Accuracy and latency are read off the ONNX
files. FEATHERWEIGHT_DATA names the folder of the network and its data, --peers that of the peers' environments.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from featherweight.core.context import Context, count_parameters, run_step
from featherweight.core.data import Arrays
from featherweight.core.evaluate import records
from featherweight.core.files import write_text
from featherweight.core.fit import Training
from featherweight.core.machine import describe
from featherweight.core.metric import Metric, Records
from featherweight.core.recipe import Recipe
from featherweight.core.step import step
from featherweight.core.target import Artifact, target
from featherweight.core.task import Task, find_task
from featherweight.model.cut import describe_sizes
from featherweight.zoo.cifar10 import jpeg_images, normalized
from featherweight.zoo.source import Source
from featherweight.zoo.splits import shifted

from .budget import busy_seconds, train_for
from .compare import CLOCKS, drop, figure, race
from .contender import Material
from .peers import VARIABLE, Peer
from .record import Figure, Record, Timing
from .verdict import ORIGINAL

TASK = "zoo:cifar10-resnet56"
PEER = "torch-pruning"
PACKAGES = ("featherweight", "torch", "onnx", "onnxruntime")
INT8 = "quantize.static"
START = "original"
WITHIN = 0.7  # of the multiply-accumulates stay when channels go before blocks do
PAGE = """\
# Benchmarks: structured pruning

This page is generated from a ledger by the command below; do not edit it. Each side had the same budget for pruning
and training together, in seconds of the processor per thread, and the same data, augmentation, loss (the original's
outputs and the labels) and schedule. Accuracy is that of the ONNX file over the whole test split. *Faster* is how many
times faster the file is in ONNX Runtime than the original's float32 file on one thread; *than int8* is the same
against the original after the same `quantize.static`. Brackets are 95% intervals.
"""


class Row(Record):
    """One network in one form; `than_int8` compares it with the original in int8."""

    name: str
    form: str
    about: str = ""
    accuracy: Figure
    drop: Figure
    macs: int
    parameters: int
    bytes: int
    seconds: float = 0.0
    busy_seconds: float = 0.0
    epochs: float = 0.0
    timings: list[Timing] = []
    than_int8: list[Timing] = []


class Ledger(Record):
    benchmark: str = "structured"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    seed: int
    task: str
    notes: str
    fewer: float
    budget_seconds: float
    threads: int
    training: dict[str, Any]
    clock: str
    rows: list[Row]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.structured", description=__doc__.splitlines()[0])
    parser.add_argument("--fewer", type=float, default=2.5, help="times fewer multiply-accumulates")
    parser.add_argument("--seconds", type=float, default=1800, help="budget of each side")
    parser.add_argument("--threads", type=int, default=2, help="of the training")
    parser.add_argument("--ours", nargs="+", default=["both"], choices=list(OURS))
    parser.add_argument("--without-peer", action="store_true", help="run our side alone")
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the training")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--timing", type=float, default=3.0, help="seconds, for each file and batch size")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: where other work keeps it busy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peers", type=Path, default=os.environ.get(VARIABLE), help="the peers' environments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-structured.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


def more_images(task: Task) -> Task:
    """The task with 25,000 JPEG copies of official training images beside its own 8,068."""
    file = "cifar10/cifar10_jpeg_train25k.npz"
    both = zip(task.train.tensors, jpeg_images(Source("cifar10-resnet56", file, "load.py"), file))
    train = Arrays(*(torch.cat(parts) for parts in both), augment=shifted(4, flip=True), convert=normalized)
    calibrate = Arrays(*(tensor[:512] for tensor in task.train.tensors), convert=normalized)
    return replace(task, train=train, calibrate=calibrate)


# -- the sides: each prunes the network, and says what it did --------------------------------------------------------
def blocks(fewer: float) -> Recipe:
    """Whole residual blocks that the calibration loss misses least."""
    return Recipe([step("prune.blocks", keep=1 / fewer)])


def channels(fewer: float) -> Recipe:
    """Channels in widths that the kernels like, by first-order Taylor scores."""
    return Recipe([step("prune.structured", keep=1 / fewer, score="taylor", multiple=16, rounds=4)])


def both(fewer: float) -> Recipe:
    """Channels within blocks of the later stages, in widths that the kernels like, then whole blocks of all stages."""
    within = step("prune.structured", keep=WITHIN, score="taylor", multiple=16, rounds=4, skip=["conv1", "layer1.*"])
    return Recipe([within, step("prune.blocks", keep=1 / fewer / WITHIN)])


OURS: dict[str, Callable[[float], Recipe]] = {"blocks": blocks, "channels": channels, "both": both}


def pruned(name: str, fewer: float, ctx: Context) -> tuple[nn.Module, str]:
    """Our network, before it is trained again."""
    recipe, model = OURS[name](fewer), ctx.task.fresh()
    for item in recipe.steps:
        model, _ = run_step(item, model, ctx)
    return model, str(recipe.dump()["steps"])


def pruned_by_peer(fewer: float, task: Task, peers: Path, folder: Path) -> tuple[nn.Module, str]:
    """What Torch-Pruning makes of the same network, put together from the state that it wrote."""
    data, out = Path(os.environ["FEATHERWEIGHT_DATA"]), folder / "pruned.safetensors"
    said = Peer(PEER, peers).run(
        "prune_torch_pruning.py",
        data / "nets.py",
        "CifarResNet(9)",
        data / "cifar10/resnet56.safetensors",
        out,
        "--fewer",
        str(fewer),
    )
    return resized(task.fresh(), load_file(out)), said.strip().splitlines()[-1]


def resized(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """`model` with the tensors of `state` in place of its own, whatever their sizes."""
    for name, tensor in state.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        old = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(tensor) if isinstance(old, nn.Parameter) else tensor)
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            describe_sizes(module)
    return model.eval()


# -- what each side gives --------------------------------------------------------------------------------------------
def trained(
    prune: Callable[[], tuple[nn.Module, str]], ctx: Context, given: argparse.Namespace, training: Training
) -> tuple[nn.Module, dict[str, Any]]:
    """Prune and train within the budget; the model, and what it took."""
    start, busy = time.perf_counter(), busy_seconds()
    model, about = prune()
    left = given.seconds - (busy_seconds() - busy)
    epochs = train_for(left, model, ctx, training)
    took = {"about": about, "epochs": epochs, "seconds": time.perf_counter() - start}
    return model, took | {"busy_seconds": busy_seconds() - busy}


def in_int8(model: nn.Module, ctx: Context) -> nn.Module:
    return run_step(step(INT8), model, ctx)[0]


def row(name: str, form: str, artifact: Artifact, task: Task, original: Records, parameters: int, **took: Any) -> Row:
    """One file, judged on the whole test split."""
    found = records(task, partial(task.call, artifact.open()))
    metric: Metric = task.metric
    return Row(
        name=name,
        form=form,
        accuracy=figure(metric.reduce(found), metric.interval(found), len(found)),
        drop=drop(metric, original, found),
        macs=artifact.manifest.work.macs,
        parameters=parameters,
        bytes=artifact.file.stat().st_size,
        **took,
    )


def timed(rows: list[Row], files: dict[tuple[str, str], Artifact], task: Task, given: argparse.Namespace) -> None:
    """Fill in the latencies: all files against the original in floats, those in int8 against the original in int8."""
    first = files[START, "float32"]
    material = Material(task, first, [], Path(), seed=given.seed, clock=given.clock)
    for batch in given.batches:
        paths = {ORIGINAL: first.file} | {
            f"{name} {form}": artifact.file for (name, form), artifact in files.items() if artifact is not first
        }
        whole = race(task, material, paths, batch, given.timing)
        ints = {
            ORIGINAL if name == START else name: artifact.file
            for (name, form), artifact in files.items()
            if form == "int8"
        }
        small = race(task, material, ints, batch, given.timing)
        for each in rows:
            plain = (each.name, each.form) == (START, "float32")
            each.timings.append(whole[ORIGINAL if plain else f"{each.name} {each.form}"])
            each.than_int8 += [small[ORIGINAL if each.name == START else each.name]] if each.form == "int8" else []


def sides(task: Task, ctx: Context, given: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        f"featherweight {name}": partial(pruned, name, given.fewer, ctx) for name in given.ours
    }
    if not given.without_peer:
        found[PEER] = partial(pruned_by_peer, given.fewer, task, given.peers, folder)
    return found


def compared(task: Task, given: argparse.Namespace, training: Training, folder: Path) -> list[Row]:
    """All rows: the original and every side, in floats and in int8."""
    ctx = Context(task, seed=given.seed, device=torch.device("cpu"))
    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {START: (task.fresh(), {})}
    for name, prune in sides(task, ctx, given, folder).items():
        print(name, file=sys.stderr, flush=True)
        models[name] = trained(prune, ctx, given, training)
    free = {name: task.free(name) for name in task.input_names}
    files: dict[tuple[str, str], Artifact] = {}
    rows: list[Row] = []
    for name, (model, took) in models.items():
        count = count_parameters(model)
        for form, made in (("float32", model), ("int8", in_int8(model, ctx))):
            place = folder / f"{name}-{form}".replace(" ", "-")
            files[name, form] = artifact = target("onnxruntime").export(made, task.example, place, free, bound=0.3)
            if not rows:
                original = records(task, partial(task.call, artifact.open()))
            rows.append(row(name, form, artifact, task, original, count, **took))
            print(f"{name} {form}: {spread(rows[-1].accuracy)}", file=sys.stderr, flush=True)
    timed(rows, files, task, given)
    return rows


# -- the page --------------------------------------------------------------------------------------------------------
def spread(found: Figure, digits: int = 2) -> str:
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    lines = [
        PAGE,
        f"* Date: {ledger.date}",
        f"* Machine: {ledger.machine}",
        f"* Versions: {', '.join(f'{name} {text}' for name, text in ledger.versions.items())}",
        f"* Command: `{ledger.command}`",
        f"* Budget: {ledger.budget_seconds:.0f} s on {ledger.threads} threads; {ledger.training}",
        f"* Network: {ledger.task}, test inputs: {ledger.rows[0].accuracy.n}. {ledger.notes}",
        "",
        *table(ledger.rows),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[Row]) -> list[str]:
    """Every row, the original first, and below how each network was made."""
    batches = [timing.batch for timing in rows[0].timings]
    head = ["network", "form", "accuracy", "fewer MACs", "parameters", "bytes", "epochs"]
    head += [f"faster, batch {batch}" for batch in batches] + [f"than int8, batch {batch}" for batch in batches]
    lines = [
        f"| {' | '.join(head)} |",
        f"|---|---|{'---:|' * (len(head) - 2)}",
    ]
    for each in rows:
        cells = [each.name, each.form, spread(each.accuracy), f"{rows[0].macs / each.macs:.2f}x"]
        cells += [f"{each.parameters:,}", f"{each.bytes:,}", f"{each.epochs:.1f}" if each.epochs else ""]
        cells += [spread(timing.faster) for timing in each.timings]
        cells += [spread(timing.faster) for timing in each.than_int8] or [""] * len(batches)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *(f"* {each.name}: {each.about}" for each in rows if each.about and each.form == "float32")]


def command(given: argparse.Namespace) -> str:
    """The command that gives these figures, without the folders of this machine."""
    return (
        f"python -m benchmarks.structured --date {given.date} --seconds {given.seconds:g} --threads {given.threads} "
        f"--fewer {given.fewer:g} --ours {' '.join(given.ours)} --lr {given.lr:g} "
        f"--precision {given.precision} --clock {given.clock} --peers FOLDER"
    )


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    task = more_images(find_task(TASK))
    training = Training(
        optimizer="sgd",
        lr=given.lr,
        weight_decay=5e-4,
        batch_size=128,
        teacher=0.9,
        temperature=4,
        precision=given.precision,
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = compared(task, given, training, Path(folder))
    versions = {name: version(name) for name in PACKAGES}
    ledger = Ledger(
        date=given.date,
        command=command(given),
        machine=describe(),
        versions=versions if given.without_peer else versions | {PEER: Peer(PEER, given.peers).versions()[PEER]},
        seed=given.seed,
        task=TASK,
        notes=f"{task.notes} Here 25,000 JPEG copies of training images train as well.",
        fewer=given.fewer,
        budget_seconds=given.seconds,
        threads=given.threads,
        training=training.model_dump(mode="json", exclude={"epochs"}, exclude_defaults=True),
        clock=given.clock,
        rows=rows,
    )
    path = given.out / f"structured-{ledger.date}.json"
    write_text(path, ledger.model_dump_json(indent=1) + "\n")
    write_text(given.page, page(ledger))
    print(f"ledger: {path}\npage:   {given.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
