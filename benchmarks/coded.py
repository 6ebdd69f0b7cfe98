"""Size of the coded checkpoint at equal accuracy, beside nncodec.

    python -m benchmarks.coded --date 2026-01-31 --peers FOLDER

Writes the ledger after every contender, and the page docs/benchmarks-coded.md. A contender that is in the ledger of
that date already is not run again, so a run that was killed goes on. One thread.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.core.context import Context, run_step
from featherweight.core.errors import RecipeError
from featherweight.core.evaluate import records, torch_run
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Split, Task, find_task
from featherweight.model import coded
from featherweight.model.encoded import lean
from featherweight.model.skeleton import skeleton

from .coded_page import PEER, Contender, Ledger, Network, Point, page
from .peers import VARIABLE, NotInstalled, Peer
from .record import Figure

RATIOS = (12, 14, 16, 18, 20, 22, 23, 24, 25, 26, 28, 30)  # decibels, ours
PARAMETERS = (-14, -16, -18, -20, -21, -22, -23, -24, -25, -26, -28, -30)  # nncodec's qp, from coarse to fine
RATES = (0.4, 0.2, 0.1)  # the price of a bit in training
NETWORKS = ("zoo:cifar10-resnet20", "zoo:cifar10-resnet56", "zoo:stsb-minilm")
PACKAGES = ("featherweight", "torch", "constriction")
REPEATS = 5
Run = Callable[[Any], Any]
Made = tuple[str, int, float, float, float, Run]  # setting, bytes, seconds (before, coding, decoding), what it computes


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coded", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--max-drop", type=float, default=0.3)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="ours, decibels, from coarse to fine")
    parser.add_argument("--qp", type=int, nargs="+", default=PARAMETERS, help="nncodec's, from coarse to fine")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="of retraining, from coarse to fine")
    parser.add_argument("--epochs", type=float, default=0.0, help="of retraining; 0 leaves it out")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--teacher", type=float, default=0.9, help="weight of the original's outputs in the loss")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-coded.md"))
    parser.add_argument("--peers", type=Path, default=os.environ.get(VARIABLE), help="folder of the environments")
    return parser.parse_args(argv)


def contenders(task: Task, given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Iterator[Made]]]]:
    """By name: what makes its files, from coarse to fine."""
    yield "featherweight", lambda: ours(task, given)
    yield PEER, lambda: theirs(task, given.qp, Peer(PEER, given.peers))
    if given.epochs:
        yield f"featherweight, retrained {given.epochs:g} epochs", lambda: retrained(task, given)


# -- ours -------------------------------------------------------------------------------------------------------------
def ours(task: Task, given: argparse.Namespace) -> Iterator[Made]:
    for ratio in given.ratios:
        yield made(task, {"kind": "quantize.coded", "snr": ratio}, f"{ratio:g} dB", given.seed)


def retrained(task: Task, given: argparse.Namespace) -> Iterator[Made]:
    """Trained under a price for every bit, the labels and the original network's outputs as the aim."""
    alike = {
        "kind": "quantize.entropy",
        "epochs": given.epochs,
        "lr": given.lr,
        "coarse": 0.5,
        "teacher": given.teacher,
    }
    for rate in given.rates:
        settings = alike | {"teacher": given.teacher, "precision": given.precision, "rate": rate}
        yield made(task, settings, f"rate {rate:g}", given.seed)


def made(task: Task, settings: dict[str, Any], setting: str, seed: int) -> Made:
    """One file: written by the target, opened again, and what it computes then."""
    start = time.process_time()
    options = {name: value for name, value in settings.items() if name != "kind"}
    ctx = Context(task, seed=seed, device=torch.device("cpu"))
    model, _ = run_step(step(settings["kind"], **options), task.fresh(), ctx)
    before = time.process_time() - start
    page_of, tensors = skeleton(lean(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fwc"
        encode = min(seconds(lambda: coded.write(path, page_of, tensors)) for _ in range(REPEATS))
        decode = min(seconds(lambda: dict(coded.Reader(path).tensors())) for _ in range(REPEATS))
        free = {name: task.free(name) for name in task.example}
        artifact = target("coded").export(model, task.example, folder + "/artifact", free=free, bound=1.0)
        runner = artifact.open()  # everything is decoded here
        size = sum(file.stat().st_size for file in Path(folder, "artifact").rglob("*.fwc"))
    return setting, size, before, encode, decode, lambda batch: task.call(runner, batch)


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


# -- theirs -----------------------------------------------------------------------------------------------------------
def theirs(task: Task, qp: list[int], peer: Peer) -> Iterator[Made]:
    """It is given the floating-point tensors of the network's state, and rounds and codes them in one go."""
    state = {name: tensor for name, tensor in task.original.state_dict().items() if tensor.is_floating_point()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "state.npz", **{name: tensor.float().numpy() for name, tensor in state.items()})
        for each in qp:
            peer.run("code_nncodec.py", folder / "state.npz", folder, "--", str(each))
            found = json.loads((folder / "figures.json").read_text(encoding="utf-8"))[str(each)]
            model = with_state(task, folder / f"{each}.npz", state)
            run = torch_run(task, model)
            yield f"qp {each}", found["bytes"], 0.0, found["encode_seconds"], found["decode_seconds"], run


def with_state(task: Task, path: Path, state: dict[str, Tensor]) -> nn.Module:
    model = task.fresh()
    with np.load(path) as file:
        decoded = {name: torch.from_numpy(file[name]).reshape(state[name].shape) for name in state}
    if unknown := model.load_state_dict(decoded, strict=False).unexpected_keys:
        raise RuntimeError(f"the peer names tensors that the model lacks: {', '.join(unknown)}")
    return model.eval()


# -- both -------------------------------------------------------------------------------------------------------------
def figure(task: Task, run: Run, split: Split) -> Figure:
    found = records(task, run, split)
    low, high = task.metric.interval(found)
    return Figure(value=task.metric.reduce(found), low=low, high=high, n=len(found))


def swept(name: str, files: Iterator[Made], network: Network, task: Task, max_drop: float) -> Contender:
    """The files of one contender, from coarse to fine, until one is within the limit on both splits."""
    found = Contender(name=name)
    try:
        for setting, size, before, encode, decode, run in files:
            point = Point(
                setting=setting,
                bytes=size,
                before_seconds=before,
                encode_seconds=encode,
                decode_seconds=decode,
                validation=figure(task, run, "validate"),
                test=figure(task, run, "test"),
            )
            found.points.append(point)
            point.validation_drop = task.metric.drop(network.validation.value, point.validation.value)
            point.test_drop = task.metric.drop(network.test.value, point.test.value)
            print(f"{network.name}: {name}: {point}", file=sys.stderr, flush=True)
            if max(point.validation_drop, point.test_drop) <= max_drop:
                return found
    except (NotInstalled, RuntimeError, RecipeError) as error:
        found.state = "not installed" if isinstance(error, NotInstalled) else "failed"
        found.reason = " ".join(str(error).split())[:300]
        return found
    found.state, found.reason = "failed", f"no file lost {max_drop:g} or less on both splits"
    return found


def start(given: argparse.Namespace, command: str) -> Ledger:
    """The ledger of that date if there is one, else a new one."""
    path = given.out / f"coded-{given.date}.json"
    if path.is_file():
        found = Ledger.model_validate_json(path.read_text(encoding="utf-8"))
        if (found.seed, found.max_drop) != (given.seed, given.max_drop):
            raise SystemExit(f"{path} has another seed or limit; take another --date or --out")
        if command not in found.commands:
            found.commands.append(command)
        return found
    versions = {name: version(name) for name in PACKAGES}
    try:
        versions |= {f"{name} (peer)": number for name, number in Peer(PEER, given.peers).versions().items()}
    except NotInstalled as missing:
        print(missing, file=sys.stderr)
    return Ledger(
        date=given.date,
        commands=[command],
        machine=describe(),
        versions=versions,
        seed=given.seed,
        max_drop=given.max_drop,
    )


def network_of(ledger: Ledger, task: Task) -> Network:
    """The entry of a task in the ledger, made if there is none."""
    found = next((each for each in ledger.networks if each.name == task.name), None)
    if found is None:
        run = torch_run(task, task.original)
        found = Network(
            name=task.name,
            metric=task.metric.name,
            parameters=sum(parameter.numel() for parameter in task.original.parameters()),
            validation=figure(task, run, "validate"),
            test=figure(task, run, "test"),
        )
        ledger.networks.append(found)
    return found


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    words = sys.argv[1:] if argv is None else argv
    ledger = start(given, " ".join(["python -m benchmarks.coded", *words]).replace(str(given.peers), "FOLDER"))
    for spec in given.networks:
        task = find_task(spec)
        network = network_of(ledger, task)
        for name, files in contenders(task, given):
            if any(each.name == name and each.state == "done" for each in network.contenders):
                continue
            found = swept(name, files(), network, task, given.max_drop)
            network.contenders = [each for each in network.contenders if each.name != name] + [found]
            write_text(given.out / f"coded-{given.date}.json", ledger.model_dump_json(indent=1) + "\n")
            write_text(given.page, page(ledger))
    return 0


if __name__ == "__main__":
    sys.exit(main())
