"""featherweight, ONNX Runtime's quantizer, NNCF and Neural Compressor on the same networks and data, in one run.

    python -m benchmarks.int8 --networks zoo:digits zoo:cifar10-resnet20 --date 2026-01-31 --peers FOLDER

Writes the ledger and the page docs/benchmarks.md. FEATHERWEIGHT_DATA names the folder of the real networks and data;
--peers (or FEATHERWEIGHT_PEERS) that of the environments which `python -m benchmarks.peers FOLDER` makes.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

from featherweight.core.machine import describe
from featherweight.core.progress import Progress

from .compare import CLOCKS, THREADS, Terms, compare
from .contender import Contender, load
from .page import write_page
from .peers import VARIABLE, installed
from .record import Ledger

NETWORKS = [
    "zoo:cifar10-resnet20",
    "zoo:cifar10-resnet56",
    "zoo:stsb-minilm",
    "zoo:kws-dscnn",
    "zoo:kws-kwt1",
    "zoo:vww-mobilenet",
    "zoo:denoise-dncnn",
    "zoo:titles-lstm",
]
PACKAGES = ("featherweight", "torch", "onnx", "onnxruntime", "numpy")


class Lines(Progress):
    """What goes on, a line at a time, on standard error."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="TASK")
    parser.add_argument("--contenders", nargs="+", default=None, metavar="NAME", help="parts of names; default: all")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/ledger"), help="folder of the ledger")
    parser.add_argument("--name", default="int8", help="of the ledger: NAME-DATE.json")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each contender and batch size")
    parser.add_argument(
        "--max-drop",
        type=float,
        default=0.5,
        metavar="PERCENT",
        help="of the original's figure: who loses more does not count as fastest or smallest",
    )
    parser.add_argument(
        "--peers", type=Path, default=os.environ.get(VARIABLE), help="folder of the peers' environments"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: where other work keeps it busy")
    parser.add_argument("--add", action="store_true", help="keep the other networks in the ledger of that date")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def chosen(parts: list[str] | None) -> list[Contender]:
    """The contenders whose names hold one of `parts`; all of them without."""
    return [entrant for name, entrant in load().items() if parts is None or any(part in name for part in parts)]


def peers_versions(folder: Path | None) -> dict[str, str]:
    """What is installed for the peers that quantize ONNX files, by package."""
    found = installed(folder)
    return {
        f"{name} (of {peer})" if name in PACKAGES else name: text
        for peer in ("nncf", "neural-compressor")
        for name, text in found.get(peer, {}).items()
    }


def command(given: argparse.Namespace) -> str:
    """The command that gives these figures, without the folders of this machine."""
    words = ["python -m benchmarks.int8 --networks", *given.networks, "--date", given.date]
    for name, standard in (
        ("contenders", None),
        ("batches", [1, 32]),
        ("seconds", 3.0),
        ("max_drop", 0.5),
        ("seed", 0),
        ("clock", "wall"),
        ("name", "int8"),
    ):
        value = getattr(given, name)
        if value != standard:
            words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    return " ".join(map(str, [*words, "--peers FOLDER"] if given.peers else words))


def main(argv: list[str] | None = None) -> int:
    given, progress = arguments(argv), Lines()
    torch.set_num_threads(THREADS)
    terms = Terms(given.batches, given.seconds, given.seed, given.max_drop, given.peers, given.clock)
    path = Ledger.path(given.out, given.name, given.date)
    networks = [old for old in Ledger.read(path).networks if old.task not in given.networks] if given.add else []
    for spec in given.networks:
        with tempfile.TemporaryDirectory() as folder:
            networks.append(compare(spec, chosen(given.contenders), Path(folder), terms, progress))
        networks.sort(key=lambda found: NETWORKS.index(found.task) if found.task in NETWORKS else len(NETWORKS))
        ledger = Ledger(
            benchmark=given.name,
            date=given.date,
            command=command(given),
            machine=describe(),
            versions={name: version(name) for name in PACKAGES} | peers_versions(given.peers),
            seed=given.seed,
            max_drop=given.max_drop,
            networks=networks,
        )
        progress.say(f"ledger: {ledger.write(given.out)}")
        progress.say(f"page:   {write_page(ledger, given.page)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
