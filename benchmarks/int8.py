"""featherweight and ONNX Runtime's own quantizer on the same networks, the same data, in one run.

    python -m benchmarks.int8 --networks zoo:digits zoo:cifar10-resnet20 --date 2026-01-31 --out benchmarks/ledger

Writes the ledger and the page docs/benchmarks.md. FEATHERWEIGHT_DATA names the folder of the real networks and data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from featherweight.core.machine import describe
from featherweight.core.progress import Progress

from .compare import compare
from .contender import Contender, load
from .page import write_page
from .record import Ledger

NETWORKS = [
    "zoo:digits",
    "zoo:cifar10-resnet20",
    "zoo:cifar10-resnet56",
    "zoo:stsb-minilm",
    "zoo:kws-dscnn",
    "zoo:vww-mobilenet",
    "zoo:kws-kwt1",
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
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--date", required=True, help="of this run, YYYY-MM-DD")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each contender and batch size")
    parser.add_argument(
        "--max-drop", type=float, default=0.5, help="who loses more does not count as fastest or smallest"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def chosen(parts: list[str] | None) -> list[Contender]:
    """The contenders whose names hold one of `parts`; all of them without."""
    return [entrant for name, entrant in load().items() if parts is None or any(part in name for part in parts)]


def main(argv: list[str] | None = None) -> int:
    given, progress = arguments(argv), Lines()
    networks = []
    for spec in given.networks:
        with tempfile.TemporaryDirectory() as folder:
            networks.append(
                compare(
                    spec, chosen(given.contenders), Path(folder), given.batches, given.seconds, given.seed, progress
                )
            )
    ledger = Ledger(
        benchmark="int8",
        date=given.date,
        command="python -m benchmarks.int8 " + " ".join(sys.argv[1:] if argv is None else argv),
        machine=describe(),
        versions={name: version(name) for name in PACKAGES},
        seed=given.seed,
        max_drop=given.max_drop,
        networks=networks,
    )
    progress.say(f"ledger: {ledger.write(given.out)}")
    progress.say(f"page:   {write_page(ledger, given.page)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
