"""Make the environments of the peers: `python -m benchmarks.peers FOLDER [NAME ...]`."""

from __future__ import annotations

import argparse
import subprocess
import venv
from pathlib import Path

from . import Peer, names, requirements


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", default=names(), metavar="NAME", help=f"default: {' '.join(names())}")
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.names) - set(names())):
        parser.error(f"no such peer: {', '.join(unknown)} (there are {', '.join(names())})")
    for name in given.names:
        print(f"{name}: {requirements(name).name}", flush=True)
        venv.create(given.folder / name, with_pip=True)
        python = Peer(name, given.folder).python
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(requirements(name))], check=True)


if __name__ == "__main__":
    main()
