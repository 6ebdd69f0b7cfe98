"""Which architectures can be pruned by 30%, here and with Torch-Pruning, from the graph to the exported file.

    python -m benchmarks.architectures --date 2026-01-31 --peers FOLDER

Writes the ledger and the page docs/benchmarks-architectures.md after each network; --add goes on where a run ended,
with --networks it makes these anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featherweight.core.context import Context, count_parameters, run_step
from featherweight.core.errors import FeatherweightError
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.outputs import named_outputs, relative_difference
from featherweight.core.step import step
from featherweight.core.target import target
from featherweight.core.task import Task
from featherweight.model.skeleton import load, save

from .peers import HERE, VARIABLE, Peer
from .record import Record

sys.path.insert(0, str(HERE))  # the networks are read as the scripts of the peers read them: by their own names

import more_networks  # noqa: F401  registers
import transformers_networks  # noqa: F401  registers
from networks import NETWORKS, Network, seeded

PEER = "torch-pruning"
BOUND = 1e-3  # relative root mean square by which the exported file may differ
SILENT = 1e-3  # by which the removal of silenced units may move the outputs
PACKAGES = ("featherweight", "torch", "transformers", "onnxruntime")
PAGE = """\
# Benchmarks: architectures

This page is generated from a ledger by the command below; do not edit it. Each network is small, has random weights,
and is pruned by 30%; then it is run, forwards and backwards, saved, loaded, exported to ONNX, run there, and compared.
A cell gives the share of the parameters that was removed and the relative difference of the exported file. Here 30% of
the multiply-accumulates go, and removing was checked to be the same as silencing (`silenced equals removed`), always.
Torch-Pruning removes 30% of the units of each layer; *moves* means that removing units which were silent before
changes the outputs, by how much (where norms run over what is removed it does so by design). It runs as it comes, and
with the numbers of heads given where a network has them (*heads*), each with a time limit.
"""


class Side(Record):
    """What became of a network on one side: done, refused with a clear line, failed at a stage, or out of time."""

    state: str
    stage: str = ""
    reason: str = ""
    removed: float | None = None
    difference: float | None = None
    moved: float | None = None
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        """Whether something was removed and the exported file does what the pruned network does."""
        fits = self.difference is not None and self.difference <= BOUND
        return self.state == "done" and fits and bool(self.removed and self.removed > 0)


class Row(Record):
    network: str
    ours: Side
    peer: Side | None = None
    peer_heads: Side | None = None


class Ledger(Record):
    benchmark: str = "architectures"
    date: str
    command: str
    machine: str
    versions: dict[str, str]
    limit: float
    rows: list[Row]


def task_of(name: str, network: Network) -> Task:
    """The network as a task whose data are its example; the loss needs no labels."""
    model, example = seeded(network.build), network.example()
    return Task(name=name, model=model, calibrate=[example], test=[example], loss=squares)


def squares(output: Any, batch: Any) -> Tensor:
    """The mean square of every output: a loss that reaches all that the outputs depend on."""
    found: list[Tensor] = [tensor.square().mean() for tensor in named_outputs(output)[1].values()]
    return torch.stack(found).sum()


def prove(task: Task, folder: Path, keep: float = 0.7) -> Side:
    """Prune, run, go backwards, save, load, export, run there, compare; what is refused by name is not an error."""
    context = Context(task, device=torch.device("cpu"))
    started = time.perf_counter()
    try:
        model, _ = run_step(step("prune.structured", keep=keep, multiple=1, recalibrate=False), task.fresh(), context)
    except FeatherweightError as refusal:
        return Side(state="refused", stage="prune", reason=str(refusal), seconds=time.perf_counter() - started)
    backward(model, task)
    save(model, folder / "model")
    again = load(folder / "model", like=task.original)
    if differs(model(**task.example), again(**task.example)):
        raise AssertionError(f"{task.name}: the loaded network gives other outputs")
    artifact = target("onnxruntime").export(again, task.example, folder / "onnx", bound=BOUND)
    return Side(
        state="done",
        removed=1 - count_parameters(model) / count_parameters(task.original),
        difference=artifact.manifest.agreement.relative,
        seconds=time.perf_counter() - started,
    )


def backward(model: nn.Module, task: Task) -> None:
    """Gradients of every parameter that the original gives one, all finite; raises `AssertionError` else."""
    found = gradients(model, task)
    for name, gradient in found.items():
        if not torch.isfinite(gradient).all():
            raise AssertionError(f"{task.name}: the gradient of {name} is not finite")
    if not found:
        raise AssertionError(f"{task.name}: nothing gets a gradient")
    if missing := sorted(gradients(task.fresh(), task).keys() - found.keys()):
        raise AssertionError(f"{task.name}: {', '.join(missing[:3])} get no gradient any more")


def gradients(model: nn.Module, task: Task) -> dict[str, Tensor]:
    """The gradient of every parameter that gets one on the example."""
    task.loss(model(**task.example), None).backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def differs(one: Any, other: Any) -> bool:
    pairs = zip(named_outputs(one)[1].values(), named_outputs(other)[1].values(), strict=True)
    return any(relative_difference(first, second) > 0 for first, second in pairs)


def ours(name: str, network: Network) -> Side:
    """Our side; a failure is a result like any other, and stays on the page."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            return prove(task_of(name, network), Path(folder))
        except (FeatherweightError, AssertionError, RuntimeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            return Side(state="failed", reason=reason, seconds=time.perf_counter() - started)


class Theirs:
    """The peer's process, which judges each network in a process of its own that ends with the time limit."""

    def __init__(self, peers: Path | None, limit: float):
        self.limit = limit
        command = [str(Peer(PEER, peers).python), str(HERE / "architecture_torch_pruning.py")]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )

    def __call__(self, name: str, heads: bool) -> Side:
        """What became of the network called so; raises `RuntimeError` if the peer's process does not answer."""
        started = time.perf_counter()
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"name": name, "heads": heads, "limit": self.limit}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {PEER} ended: status {self.process.wait()}")
        found = {key: None if value == float("inf") else value for key, value in json.loads(answer).items()}
        state = {"done": "done", "late": "out of time"}.get(found["stage"], "failed")
        return Side(state=state, seconds=time.perf_counter() - started, **found)


# -- the page --------------------------------------------------------------------------------------------------------
PLAIN = str.maketrans("|[]`", "/()'")  # what a message says must not end a cell or begin a link


def cell(side: Side | None) -> str:
    if side is None:
        return ""
    if side.state != "done":
        where = f" ({side.stage})" if side.stage and side.state == "failed" else ""
        return f"{side.state}{where}: {side.reason}".translate(PLAIN)
    if not side.removed:
        return "removes nothing, without a word"
    moved = f"; moves by {side.moved:.1g}" if side.moved is not None and side.moved > SILENT else ""
    fits = "" if side.passes else "; does not agree"
    return f"{side.removed:.0%}, {side.difference or 0:.0e}{moved}{fits}"


def summary(rows: list[Row]) -> list[str]:
    """How many pass on each side."""
    helped = [row.peer_heads or row.peer for row in rows]
    silent = [side for side in helped if side and side.passes and (side.moved or 0) <= SILENT]
    return [
        f"* featherweight: {sum(row.ours.passes for row in rows)} of {len(rows)} pass, "
        f"{sum(row.ours.state == 'refused' for row in rows)} are refused by name",
        f"* {PEER}: {sum(bool(row.peer and row.peer.passes) for row in rows)} pass as it comes, "
        f"{sum(bool(side and side.passes) for side in helped)} with head counts; of those {len(silent)} do not move "
        "when silent units go",
    ]


def page(ledger: Ledger) -> str:
    """The whole page in Markdown."""
    lines = [
        PAGE,
        f"* Date: {ledger.date}",
        f"* Machine: {ledger.machine}",
        f"* Versions: {', '.join(f'{name} {text}' for name, text in ledger.versions.items())}",
        f"* Command: `{ledger.command}`; time limit of the peer {ledger.limit:.0f} s a network",
        *summary(ledger.rows),
        "",
        f"| network | featherweight | {PEER} | {PEER}, heads |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {' | '.join([row.network, cell(row.ours), cell(row.peer), cell(row.peer_heads)])} |" for row in ledger.rows
    ]
    return "\n".join(lines) + "\n"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=None, metavar="NAME", help="parts of names; default: all")
    parser.add_argument(
        "--limit", type=float, default=60, help="seconds of the processor that the peer may take for a network"
    )
    parser.add_argument("--without-peer", action="store_true", help="run our side alone")
    parser.add_argument("--add", action="store_true", help="keep what is in the ledger of that date and not named")
    parser.add_argument("--peers", type=Path, default=os.environ.get(VARIABLE), help="the peers' environments")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks-architectures.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    return parser.parse_args(argv)


def row(name: str, network: Network, theirs: Theirs | None) -> Row:
    own = ours(name, network)
    if theirs is None:
        return Row(network=name, ours=own)
    plain = theirs(name, False)
    return Row(network=name, ours=own, peer=plain, peer_heads=theirs(name, True) if network.heads else None)


def main(argv: list[str] | None = None) -> int:
    given = arguments(argv)
    torch.set_num_threads(1)
    path = given.out / f"architectures-{given.date}.json"
    kept = Ledger.model_validate_json(path.read_text("utf-8")).rows if given.add and path.is_file() else []
    versions = {name: version(name) for name in PACKAGES}
    versions |= {} if given.without_peer else {PEER: Peer(PEER, given.peers).versions()[PEER]}
    rows = {each.network: each for each in kept}
    theirs = None if given.without_peer else Theirs(given.peers, given.limit)
    for name, network in NETWORKS.items():
        named = any(part.lower() in name.lower() for part in given.networks or ())
        if not named and (given.networks or name in rows):
            continue
        rows[name] = row(name, network, theirs)
        print(f"{name}: {cell(rows[name].ours)} | {cell(rows[name].peer)}", file=sys.stderr, flush=True)
        ledger = Ledger(
            date=given.date,
            command=f"python -m benchmarks.architectures --date {given.date} --limit {given.limit:g} --peers FOLDER",
            machine=describe(),
            versions=versions,
            limit=given.limit,
            rows=[rows[each] for each in NETWORKS if each in rows],
        )
        write_text(path, ledger.model_dump_json(indent=1) + "\n")
        write_text(given.page, page(ledger))
    print(f"ledger: {path}\npage:   {given.page}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
