"""Size of the coded checkpoint at equal accuracy, beside nncodec: `python -m benchmarks.coded --out LEDGER.json`.

Both code the same network at several settings. Of each, the smallest file is chosen whose drop on the validation split
is within the limit, and only that one is measured on the test split. Neither is trained; ours sees calibration data.
Seconds are those of the processor, one thread, for coding and decoding all tensors; ours without the rounding, which
comes before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from featherweight.core.context import Context, run_step
from featherweight.core.evaluate import torch_figure
from featherweight.core.files import write_text
from featherweight.core.machine import describe
from featherweight.core.step import step
from featherweight.core.task import Task, find_task
from featherweight.model import coded
from featherweight.model.encoded import lean
from featherweight.model.skeleton import skeleton

from .peers import VARIABLE, NotInstalled, Peer, installed
from .record import Record

PEER = "nncodec"
RATIOS = (16, 18, 20, 22, 24, 27)  # decibels
PARAMETERS = (-16, -18, -20, -22, -24, -26, -28)  # nncodec's qp, from coarse to fine
REPEATS = 3


class Point(Record):
    """One file: of whom, at what setting, how large, how fast, and what it loses (`test` only for the chosen one)."""

    contender: str
    setting: str
    bytes: int
    encode_seconds: float
    decode_seconds: float
    validate_drop: float
    test: float | None = None
    chosen: bool = False


class Network(Record):
    name: str
    parameters: int
    inputs: dict[str, int]
    validation: float
    test: float
    points: list[Point]


class Ledger(Record):
    date: str
    machine: str
    versions: dict[str, dict[str, str]]
    command: str
    max_drop: float
    networks: list[Network] = []


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coded", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--networks", nargs="+", default=["zoo:cifar10-resnet20", "zoo:cifar10-resnet56", "zoo:stsb-minilm"]
    )
    parser.add_argument("--max-drop", type=float, default=0.3)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS, help="ours, decibels, from coarse to fine")
    parser.add_argument("--qp", type=int, nargs="+", default=PARAMETERS, help="nncodec's, from coarse to fine")
    parser.add_argument("--peers", type=Path, default=os.environ.get(VARIABLE))
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    versions = {name: found for name, found in installed(given.peers).items() if name == PEER}
    command = f"python -m benchmarks.coded --max-drop {given.max_drop:g} --networks {' '.join(given.networks)}"
    date = datetime.date.today().isoformat()
    ledger = Ledger(date=date, machine=describe(), versions=versions, command=command, max_drop=given.max_drop)
    for spec in given.networks:
        ledger.networks.append(network(spec, given.max_drop, given.ratios, given.qp, Peer(PEER, given.peers)))
        write_text(given.out, ledger.model_dump_json(indent=1) + "\n")


def network(spec: str, max_drop: float, ratios: list[float], qp: list[int], peer: Peer) -> Network:
    """Everything about one network."""
    task = find_task(spec)
    parameters = sum(parameter.numel() for parameter in task.original.parameters())
    inputs = {split: sum(task.count(batch) for batch in task.batches(split)) for split in ("validate", "test")}
    validate, test = (torch_figure(task, None, split) for split in ("validate", "test"))
    points = _swept(task, ((f"{snr:g} dB", *_ours(task, snr)) for snr in ratios), "featherweight", validate, max_drop)
    try:
        points += _swept(task, _theirs(task, qp, peer), PEER, validate, max_drop)
    except NotInstalled as error:
        print(f"{PEER}: {error}", flush=True)
    return Network(name=task.name, parameters=parameters, inputs=inputs, validation=validate, test=test, points=points)


def _swept(task: Task, made: Any, contender: str, validate: float, max_drop: float) -> list[Point]:
    """The points of one contender, from coarse to fine, up to the first that is within the limit."""
    found = []
    for setting, size, encode, decode, model in made:
        drop = task.metric.drop(validate, torch_figure(task, model, "validate"))
        point = Point(
            contender=contender,
            setting=setting,
            bytes=size,
            encode_seconds=encode,
            decode_seconds=decode,
            validate_drop=drop,
        )
        found.append(point)
        if drop <= max_drop:
            found[-1] = point.model_copy(update={"chosen": True, "test": torch_figure(task, model, "test")})
        print(f"{task.name} {found[-1]}", flush=True)
        if found[-1].chosen:
            break
    return found


def _ours(task: Task, snr: float) -> tuple[int, float, float, nn.Module]:
    """Bytes of the whole file, seconds of coding and of decoding, and the model that comes out of the file."""
    item = step("quantize.coded", snr=snr)
    model, _ = run_step(item, task.fresh(), Context(task, device=torch.device("cpu")))
    page, tensors = skeleton(lean(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.fwc"
        coded.write(path, page, tensors)
        encode = min(_seconds(lambda: coded.write(path, page, tensors)) for _ in range(REPEATS))
        decode = min(_seconds(lambda: dict(coded.Reader(path).tensors())) for _ in range(REPEATS))
        return path.stat().st_size, encode, decode, model


def _seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _theirs(task: Task, qp: list[int], peer: Peer) -> Any:
    """The same of nncodec: it is given the floating-point tensors of the network's state."""
    state = {name: tensor for name, tensor in task.original.state_dict().items() if tensor.is_floating_point()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "state.npz", **{name: tensor.float().numpy() for name, tensor in state.items()})  # type: ignore[arg-type]
        peer.run("code_nncodec.py", folder / "state.npz", folder, "--", *map(str, qp))
        figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        for each in qp:
            found = figures[str(each)]
            model = _with_state(task, folder / f"{each}.npz", state)
            yield f"qp {each}", found["bytes"], found["encode_seconds"], found["decode_seconds"], model


def _with_state(task: Task, path: Path, state: dict[str, Tensor]) -> nn.Module:
    model = task.fresh()
    with np.load(path) as file:
        decoded = {name: torch.from_numpy(file[name]).reshape(state[name].shape) for name in state}
    model.load_state_dict(decoded, strict=False)
    return model.eval()


if __name__ == "__main__":
    main()
