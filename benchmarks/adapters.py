"""Adapters on bases of 32, 8 and 4 bits: what they reach, weigh and cost, switched over one file, and merged.

    python -m benchmarks.adapters --date 2026-01-31 --epochs 3

Sentences: SST-2 on MiniLM. Texts: a small language model that meets other texts. Writes the ledger after every row, and
the page docs/benchmarks-adapters.md. A row that is in the ledger of that date, with the same settings, is not made
again, so a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from torch import nn

from featherweight.api import save_adapter
from featherweight.core.adapted import adapted, adapter_tensors
from featherweight.core.context import Context, run_recipe, run_step
from featherweight.core.errors import RecipeError
from featherweight.core.evaluate import records, torch_run
from featherweight.core.files import write_text
from featherweight.core.fit import steps_per_epoch
from featherweight.core.machine import describe
from featherweight.core.recipe import Recipe
from featherweight.core.soft import copied
from featherweight.core.step import Step, step
from featherweight.core.target import Runner, target
from featherweight.core.task import Task
from featherweight.methods.adapt.merging import merge_rounded, outputs, relative

from .adapters_page import page
from .adapters_tasks import STYLES, sentiment, style
from .compare import figure
from .record import Figure, Record

PACKAGES = ("featherweight", "torch", "peft", "onnxruntime")
BASES: dict[str, list[dict[str, Any]]] = {
    "float32": [],
    "int8": [{"kind": "quantize.static"}],
    "4 bits": [{"kind": "quantize.weights", "bits": 4, "group": 32}],
}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {"kind": "adapt.lora", "rank": 8, "merge": False},
    "DoRA": {"kind": "adapt.lora", "rank": 8, "dora": True, "merge": False},
    "bottleneck": {"kind": "adapt.bottleneck", "size": 16},
    "IA3": {"kind": "adapt.ia3", "merge": False},
    "prompt": {"kind": "adapt.prompt", "tokens": 16},
    "prefix": {"kind": "adapt.prefix", "tokens": 16},
}
FAST = {"IA3": 10.0, "prompt": 30.0, "prefix": 10.0}  # times the rate of the others: few parameters, far from zero
RANKS = {"shakespeare": 4, "wikipedia": 8, "headlines": 16}  # of the adapters that are switched


class Learned(Record):
    """One way of training on one base."""

    task: str
    base: str
    way: str
    step: dict[str, Any]
    quality: Figure
    before: Figure
    trained: int
    bytes: int  # of the adapter's file
    step_ms: float
    peak_mb: float | None  # of memory, above what the process held before; None where the system does not say


class Switched(Record):
    """Three adapters of unlike ranks over one loaded base in ONNX Runtime."""

    base: str
    base_bytes: int
    adapter_bytes: dict[str, int]
    quality: dict[str, dict[str, float]]  # text -> adapter (or "none") -> perplexity in ONNX Runtime
    torch_quality: dict[str, float]  # text -> perplexity of its adapter in torch
    one_session: bool
    switch_ms: float
    load_ms: float
    run_ms: dict[str, float]  # without slots, with none, with each adapter
    switching_mb: float  # memory that a hundred switches took


class Merged(Record):
    """An adapter merged into a base, rounded to nearest and with the adapter's data."""

    task: str
    base: str
    bound: float
    moved: dict[str, float]  # "nearest" and "with data": how far the outputs moved, relative
    quality: dict[str, Figure]  # beside, nearest, with data, base
    refused: str  # what the step says at a bound of a tenth of what it needed


class Ledger(Record):
    """One run of this benchmark."""

    benchmark: str = "adapters"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    clock: str = "wall"
    metrics: dict[str, str] = {}
    learned: list[Learned] = []
    switched: list[Switched] = []
    merged: list[Merged] = []


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="*", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--bases", nargs="*", default=list(BASES), choices=list(BASES))
    parser.add_argument("--ways", nargs="*", default=[*WAYS, "all weights"], choices=[*WAYS, "all weights"])
    parser.add_argument("--epochs", type=float, default=3.0, help="of every training")
    parser.add_argument("--lr", type=float, default=1e-3, help="of LoRA, DoRA and bottlenecks")
    parser.add_argument("--limit", type=int, default=None, help="inputs of each split, for a quick look")
    parser.add_argument("--bound", type=float, default=0.1, help="of what a merge may move the outputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="processor: of the thread that works")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-adapters.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


CLOCKS = {"wall": time.perf_counter, "processor": time.thread_time}
SECTIONS = ["sentences", "texts", "switched", "merged"]


# -- training ---------------------------------------------------------------------------------------------------------
def tool(way: str, given: argparse.Namespace, **changes: Any) -> Step:
    """The step that trains in this way; all for the same number of epochs."""
    if way == "all weights":
        return step("finetune", epochs=given.epochs, lr=given.lr / 10)
    settings = {**WAYS[way], "epochs": given.epochs, "lr": given.lr * FAST.get(way, 1.0), **changes}
    return step(settings.pop("kind"), **settings)


def based(task: Task, base: str) -> nn.Module:
    """The model of a task in the form of a base."""
    return run_recipe(Recipe(BASES[base]), Context(task, device=torch.device("cpu")))[0]


def learned(task: Task, base: str, way: str, item: Step, given: argparse.Namespace) -> Learned:
    """Train in one way on one base, and judge on the whole test split."""
    model, ctx = based(task, base), Context(task, device=torch.device("cpu"))
    before, held = judged(task, model), memory_mb()
    clean = forget_peak()
    start = CLOCKS[given.clock]()
    model, _ = run_step(item, model, ctx)
    spent, peak = CLOCKS[given.clock]() - start, peak_mb()
    steps = max(1, round(given.epochs * steps_per_epoch(ctx, task.batch_size)))
    own = adapter_tensors(model)
    count = sum(each.numel() for each in (own or dict(model.named_parameters())).values())
    with TemporaryDirectory() as folder:
        size = save_adapter(model, Path(folder) / "adapter").stat().st_size if own else 4 * count
    return Learned(
        task=task.name,
        base=base,
        way=way,
        step=item.full(),
        quality=judged(task, model),
        before=before,
        trained=count,
        bytes=size,
        step_ms=1000 * spent / steps,
        peak_mb=peak - held if clean else None,
    )


def judged(task: Task, model: nn.Module) -> Figure:
    found = records(task, torch_run(task, model))
    return figure(task.metric.reduce(found), task.metric.interval(found), len(found))


def memory_mb() -> float:
    return psutil.Process().memory_info().rss / 2**20


def forget_peak() -> bool:
    """Let the system count the peak of memory from now; whether it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mb() -> float:
    """The peak of memory of this process since it was forgotten."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# -- switching --------------------------------------------------------------------------------------------------------
def switched(base: str, given: argparse.Namespace, folder: Path) -> Switched:
    """Train an adapter for each text on one base, and run them all over one loaded file."""
    tasks = {name: style(name, given.limit) for name in STYLES}
    first, model = tasks["shakespeare"], based(tasks["shakespeare"], base)
    models, files = {}, {}
    for name, task in tasks.items():
        item = tool("LoRA", given, rank=RANKS[name])
        models[name], _ = run_step(item, copied(model), Context(task, device=torch.device("cpu")))
        files[name] = save_adapter(models[name], folder / f"{name}.safetensors")
    free = {name: first.free(name) for name in first.input_names}
    plain = target("onnxruntime").export(model, first.example, folder / "plain", free)
    artifact = target("onnxruntime").export(models["shakespeare"], first.example, folder / "slots", free)
    clock = CLOCKS[given.clock]
    start = clock()
    runner = artifact.open()
    load_ms = 1000 * (clock() - start)
    session: Any = runner.session
    inner, example = session.session, {name: each[:1].numpy() for name, each in first.example.items()}
    run_ms, quality = {"without slots": median_ms(plain.open(), example, clock)}, {}
    for text, task in tasks.items():
        quality[text] = {}
        for name in ("none", *tasks):
            runner.use(None if name == "none" else files[name])
            run_ms[name] = median_ms(runner, example, clock)
            quality[text][name] = task.metric.reduce(records(task, lambda batch, task=task: task.call(runner, batch)))
    held = memory_mb()
    times = [seconds(lambda place=place: runner.use(list(files.values())[place % 3]), clock) for place in range(100)]
    return Switched(
        base=base,
        base_bytes=artifact.bytes(),
        adapter_bytes={name: file.stat().st_size for name, file in files.items()},
        quality=quality,
        torch_quality={name: judged(tasks[name], models[name]).value for name in tasks},
        one_session=session.session is inner and runner.session is session,
        switch_ms=1000 * statistics.median(times),
        load_ms=load_ms,
        run_ms=run_ms,
        switching_mb=memory_mb() - held,
    )


def median_ms(runner: Runner, example: dict[str, Any], clock: Callable[[], float], rounds: int = 50) -> float:
    """Milliseconds of one run: the median."""
    runner(**example)
    return 1000 * statistics.median(seconds(lambda: runner(**example), clock) for _ in range(rounds))


def seconds(work: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


# -- merging ----------------------------------------------------------------------------------------------------------
def merged(task: Task, base: str, given: argparse.Namespace) -> Merged:
    """One adapter beside its base, merged blindly, and merged with its data."""
    ctx = Context(task, device=torch.device("cpu"))
    start, item = based(task, base), tool("LoRA", given)
    beside, _ = run_step(item, copied(start), ctx)
    blind = copied(beside)
    for name in [name for name, _ in adapted(blind)]:
        merge_rounded(blind, name, None)
    with_data, _ = run_step(tool("LoRA", given, merge=True, bound=1e9), copied(start), ctx)
    wanted = outputs(beside, ctx)
    models = {"nearest": blind, "with data": with_data}
    moved = {name: relative(outputs(model, ctx), wanted) for name, model in models.items()}
    refused = ""
    try:
        run_step(tool("LoRA", given, merge=True, bound=moved["with data"] / 10), copied(start), ctx)
    except RecipeError as error:
        refused = str(error)
    quality = {name: judged(task, model) for name, model in {"base": start, "beside": beside, **models}.items()}
    return Merged(task=task.name, base=base, bound=given.bound, moved=moved, quality=quality, refused=refused)


# -- the run ----------------------------------------------------------------------------------------------------------
class Run:
    """The ledger of this date, from the file if it lies there, written anew after every row."""

    def __init__(self, given: argparse.Namespace, argv: list[str]):
        self.given, self.path = given, given.out / f"adapters-{given.date}.json"
        there = self.path.is_file()
        before = Ledger.model_validate_json(self.path.read_text(encoding="utf-8")) if there else None
        self.ledger = Ledger(
            date=given.date,
            command="python -m benchmarks.adapters " + " ".join(argv),
            machine=describe(),
            clock=given.clock,
            versions={name: version(name) for name in PACKAGES},
        )
        if before:
            self.ledger.metrics, self.ledger.learned = before.metrics, before.learned
            self.ledger.switched, self.ledger.merged = before.switched, before.merged

    def learn(self, task: Task) -> None:
        self.ledger.metrics[task.name] = task.metric.name
        for base in self.given.bases:
            for way in self.given.ways:
                if way == "all weights" and base != "float32":
                    continue
                item = tool(way, self.given)
                done = ((row.task, row.base, row.way, row.step) for row in self.ledger.learned)
                if (task.name, base, way, item.full()) not in done:
                    row = learned(task, base, way, item, self.given)
                    self.ledger.learned.append(row)
                    self.keep(f"{task.name}, {base}, {way}: {row.quality.value:.3f}")

    def keep(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
        write_text(self.path, self.ledger.model_dump_json(indent=1) + "\n")
        write_text(self.given.page, page(self.ledger))


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    import_module("peft")  # which takes seconds the first time
    run = Run(given, sys.argv[1:] if argv is None else argv)
    if "sentences" in given.sections:
        run.learn(sentiment(given.limit))
    if "texts" in given.sections:
        run.learn(style("shakespeare", given.limit))
    for base in given.bases if "switched" in given.sections else ():
        if base not in {row.base for row in run.ledger.switched}:
            with TemporaryDirectory() as folder:
                run.ledger.switched.append(switched(base, given, Path(folder)))
            run.keep(f"three adapters over {base}")
    for task in (sentiment, style) if "merged" in given.sections else ():
        made = task(given.limit) if task is sentiment else task("shakespeare", given.limit)
        for base in [base for base in given.bases if base != "float32"]:
            if (made.name, base) not in {(row.task, row.base) for row in run.ledger.merged}:
                run.ledger.merged.append(merged(made, base, given))
                run.keep(f"{made.name}, merged into {base}: moved by {run.ledger.merged[-1].moved}")
    print(f"ledger: {run.path}\npage:   {given.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
