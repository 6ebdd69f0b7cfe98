"""Distillation: each loss beside the same student trained without a teacher, with the same budget, on one machine.

    python -m benchmarks.distillation --date 2026-01-31 --epochs 20 --seeds 0 1 2

Images: two students trained from scratch under a ResNet-56. Sentences: MiniLM with every other layer, by DistilBERT's
recipe. Writes the ledger after every row, and the page docs/benchmarks-distillation.md. A row that is in the ledger of
that date, with the same settings, is not made again, so a run that was killed goes on. It trains on CUDA where there is
one.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from featherweight.core.context import Context, count_parameters, run_step
from featherweight.core.evaluate import records, torch_run
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.soft import copied
from featherweight.core.step import Step, step
from featherweight.core.target import target
from featherweight.core.task import Task, find_task
from featherweight.methods.sparse.scratch import start_anew
from featherweight.model.blocks import find_blocks, remove_blocks

from .compare import Material, figure, race
from .distillation_page import page
from .record import Figure, Record, Timing
from .verdict import ORIGINAL

PACKAGES = ("featherweight", "torch", "onnxruntime")
ALONE = "alone"
LOGITS: dict[str, dict[str, Any]] = {
    "kl": {"loss": "kl", "weight": 0.9},
    "mse": {"loss": "mse", "weight": 0.5},
    "dkd": {"loss": "dkd", "weight": 0.5, "beta": 2.0},
    "dist": {"loss": "dist", "weight": 0.5},
}
FEATURES: dict[str, dict[str, Any]] = {  # beside the task's loss alone, with weights that make both parts alike in size
    "hint": {"loss": "hint", "feature_weight": 0.5},
    "attention": {"loss": "attention", "feature_weight": 20.0},
    "rkd": {"loss": "rkd", "feature_weight": 10.0},
    "crd": {"loss": "crd", "feature_weight": 0.2},
    "cosine": {"loss": "cosine", "feature_weight": 1.0},
}
SENTENCES = (ALONE, "outputs", "DistilBERT")


class Taught(Record):
    """One student trained one way: how, and how good."""

    section: str  # images or sentences
    student: str
    way: str
    seed: int
    step: dict[str, Any]
    parameters: int
    accuracy: Figure
    validation: float
    seconds: float
    device: str


class Sized(Record):
    """A network of the sentences as an artifact: bytes of its file, and its latency beside the original's."""

    student: str
    parameters: int
    bytes: int
    accuracy: Figure  # of the torch model
    timings: list[Timing] = []


class Ledger(Record):
    """One run of this benchmark."""

    benchmark: str = "distillation"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    images: str
    sentences: str
    teacher: str
    ensemble: str
    notes: dict[str, str] = {}
    originals: dict[str, Figure] = {}  # by section, of the teacher on the same test split
    rows: list[Taught] = []
    sizes: list[Sized] = []


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distillation", description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="zoo:cifar10-resnet20", help="task with the images that students train on")
    parser.add_argument("--teacher", default="zoo:cifar10-resnet56", help="task whose model teaches them")
    parser.add_argument("--ensemble", default="zoo:cifar10-resnet20", help="task whose model teaches beside it")
    parser.add_argument("--sentences", default="zoo:stsb-minilm")
    parser.add_argument("--sections", nargs="*", default=["images", "sentences"], choices=["images", "sentences"])
    parser.add_argument("--students", nargs="*", default=list(STUDENTS), choices=list(STUDENTS))
    ways = [ALONE, *LOGITS, *FEATURES, "ensemble"]
    parser.add_argument("--ways", nargs="*", default=ways, choices=ways)
    parser.add_argument("--epochs", type=float, default=20.0, help="of every training on the images")
    parser.add_argument("--sentence-epochs", type=float, default=3.0)
    parser.add_argument("--lr", type=float, default=0.05, help="on the images, SGD")
    parser.add_argument("--sentence-lr", type=float, default=1e-4, help="AdamW")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--timing", type=float, default=3.0, help="seconds, for each file and batch size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-distillation.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


# -- students ---------------------------------------------------------------------------------------------------------
def plain(teacher: nn.Module) -> nn.Module:
    """A network of the teacher's kind with new weights: ResNet-20 where the teacher is a ResNet of CIFAR-10."""
    kind: Any = type(teacher)
    student = kind(3) if kind.__name__ == "CifarResNet" else copied(teacher)
    start_anew(student)
    return student


def separable(teacher: nn.Module) -> nn.Module:
    """The same with a depthwise and a pointwise convolution, each with batch norm, in place of every convolution with
    a kernel but those of the first layer.
    """
    student = plain(teacher)
    for name, layer in list(student.named_modules()):
        if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1 and layer.in_channels > 3:
            parent, _, last = name.rpartition(".")
            setattr(student.get_submodule(parent), last, depthwise_and_pointwise(layer))
    return student


def depthwise_and_pointwise(layer: nn.Conv2d) -> nn.Sequential:
    """New layers for a convolution (MobileNet, arXiv:1704.04861): N x C x H x W to what it gives."""
    wide, place = layer.in_channels, {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return nn.Sequential(
        nn.Conv2d(wide, wide, layer.kernel_size, groups=wide, bias=False, **place),  # type: ignore[arg-type]
        nn.BatchNorm2d(wide),
        nn.ReLU(),
        nn.Conv2d(wide, layer.out_channels, 1, bias=layer.bias is not None),
    )


STUDENTS = {"plain": plain, "separable": separable}


def every_other(task: Task) -> nn.Module:
    """The task's model without every other of its blocks, the first of each pair kept."""
    student = task.fresh()
    found = find_blocks(student, task.example).blocks
    return remove_blocks(student, found[1::2])


# -- training ---------------------------------------------------------------------------------------------------------
def image_step(way: str, given: argparse.Namespace) -> Step:
    """The step that trains a student on the images; all train alike but for the loss."""
    alike = {"epochs": given.epochs, "lr": given.lr, "optimizer": "sgd", "weight_decay": 5e-4}
    if way == ALONE:
        return step("finetune", **alike)
    if way in FEATURES:
        return step("distill.features", weight=0.0, **FEATURES[way], **alike)
    joined = {"teachers": [given.ensemble], **LOGITS["kl"]} if way == "ensemble" else LOGITS[way]
    return step("distill.logits", **joined, **alike)


def sentence_step(way: str, given: argparse.Namespace) -> Step:
    alike = {"epochs": given.sentence_epochs, "lr": given.sentence_lr}
    if way == ALONE:
        return step("finetune", **alike)
    if way == "outputs":
        return step("distill.logits", weight=5 / 7, **alike)
    recipe = {"loss": "cosine", "weight": 5 / 7, "feature_weight": 1 / 7, "blocks": [[-1, -1]]}
    return step("distill.features", **recipe, **alike)


def taught(
    section: str, student: str, way: str, seed: int, item: Step, model: nn.Module, task: Task, given: argparse.Namespace
) -> tuple[Taught, nn.Module]:
    """Train one student and judge it on the whole test split."""
    start = time.perf_counter()
    model, _ = run_step(item, model, Context(task, seed=seed, device=torch.device(given.device)))
    seconds = time.perf_counter() - start
    row = Taught(
        section=section,
        student=student,
        way=way,
        seed=seed,
        step=item.full(),
        parameters=count_parameters(model),
        accuracy=judged(task, model, given.device),
        validation=task.metric.reduce(records(task, torch_run(task, model, given.device), "validate")),
        seconds=seconds,
        device=given.device,
    )
    return row, model


def judged(task: Task, model: nn.Module, device: str) -> Figure:
    found = records(task, torch_run(task, model.to(device), device))
    return figure(task.metric.reduce(found), task.metric.interval(found), len(found))


def sized(task: Task, models: dict[str, nn.Module], given: argparse.Namespace) -> list[Sized]:
    """The original and a student as artifacts of ONNX Runtime: what they weigh, and latency side by side."""
    free = {name: task.free(name) for name in task.input_names}
    with TemporaryDirectory() as folder:
        made = {
            name: target("onnxruntime").export(model.cpu(), task.example, Path(folder) / str(place), free)
            for place, (name, model) in enumerate(models.items())
        }
        material = Material(task, made[ORIGINAL], [], Path(folder), 0)
        files = {name: artifact.file for name, artifact in made.items()}
        timings = [race(task, material, files, batch, given.timing) for batch in (1, 32)]
        return [
            Sized(
                student=name,
                parameters=count_parameters(models[name]),
                bytes=made[name].bytes(),
                accuracy=judged(task, models[name], "cpu"),
                timings=[found[name] for found in timings],
            )
            for name in models
        ]


# -- the run ----------------------------------------------------------------------------------------------------------
class Run:
    """The ledger of this date, from the file if it lies there, written anew after every row."""

    def __init__(self, given: argparse.Namespace, argv: list[str]):
        self.given, self.path = given, given.out / f"distillation-{given.date}.json"
        there = self.path.is_file()
        before = Ledger.model_validate_json(self.path.read_text(encoding="utf-8")) if there else None
        self.ledger = Ledger(
            date=given.date,
            command="python -m benchmarks.distillation " + " ".join(argv),
            machine=describe() if given.device == "cpu" else f"{describe()}, {torch.cuda.get_device_name()}",
            versions={name: version(name) for name in PACKAGES},
            images=given.images,
            sentences=given.sentences,
            teacher=given.teacher,
            ensemble=given.ensemble,
        )
        if before:
            self.ledger.rows, self.ledger.sizes = before.rows, before.sizes
            self.ledger.notes, self.ledger.originals = before.notes, before.originals

    def has(self, section: str, student: str, way: str, seed: int, item: Step) -> bool:
        wanted = (section, student, way, seed, item.full())
        return any((row.section, row.student, row.way, row.seed, row.step) == wanted for row in self.ledger.rows)

    def began(self, section: str, task: Task) -> None:
        """Judge the teacher, once."""
        if section not in self.ledger.originals:
            self.ledger.originals[section] = judged(task, task.fresh(), self.given.device)
            self.ledger.notes[section] = task.notes
            self.keep()

    def add(self, row: Taught) -> None:
        print(f"{row.student}, {row.way}, seed {row.seed}: {row.accuracy.value:.2f}", file=sys.stderr, flush=True)
        self.ledger.rows.append(row)
        self.keep()

    def keep(self) -> None:
        write_text(self.path, self.ledger.model_dump_json(indent=1) + "\n")
        write_text(self.given.page, page(self.ledger))


def images(run: Run, given: argparse.Namespace) -> None:
    teacher = find_task(given.teacher)
    task = find_task(given.images)
    if task.name != teacher.name:
        digest = f"{task.fingerprint} taught by {teacher.fingerprint}" if task.fingerprint else ""
        task = replace(task, model=teacher.original, fingerprint=digest)
    run.began("images", task)
    for seed in given.seeds:
        for student in given.students:
            for way in given.ways:
                item = image_step(way, given)
                if run.has("images", student, way, seed, item):
                    continue
                torch.manual_seed(seed)
                model = STUDENTS[student](task.original)
                run.add(taught("images", student, way, seed, item, model, task, given)[0])


def sentences(run: Run, given: argparse.Namespace) -> None:
    task = find_task(given.sentences)
    run.began("sentences", task)
    for seed in given.seeds:
        for way in SENTENCES:
            item = sentence_step(way, given)
            if run.has("sentences", "every other layer", way, seed, item):
                continue
            model = every_other(task)
            row, model = taught("sentences", "every other layer", way, seed, item, model, task, given)
            run.add(row)
    if not run.ledger.sizes:
        run.ledger.sizes = sized(task, {ORIGINAL: task.fresh(), "every other layer": every_other(task)}, given)
        run.keep()


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(given.threads)
    run = Run(given, sys.argv[1:] if argv is None else argv)
    if "images" in given.sections:
        images(run, given)
    if "sentences" in given.sections:
        sentences(run, given)
    print(f"ledger: {run.path}\npage:   {given.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
