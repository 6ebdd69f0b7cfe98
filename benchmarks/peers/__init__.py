"""Peers that do not go into our environment: each runs as a process in a virtual environment of its own.

`python -m benchmarks.peers FOLDER` makes the environments from the files NAME.txt beside this one; the benchmarks find
them in the folder that --peers or FEATHERWEIGHT_PEERS names.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
VARIABLE = "FEATHERWEIGHT_PEERS"
LIMIT = 3600  # seconds, after which a peer counts as failed


class NotInstalled(Exception):
    """The environment of a peer is not there: it is listed as such, and not run."""


@dataclass(frozen=True)
class Peer:
    """A package in an environment of its own under `folder` (None: nowhere)."""

    name: str
    folder: Path | None

    @property
    def python(self) -> Path:
        """The interpreter of its environment. Raises `NotInstalled` if there is none."""
        if self.folder is None:
            raise NotInstalled(f"--peers or {VARIABLE} names no folder of environments")
        path = self.folder.absolute() / self.name / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        if not path.exists():
            raise NotInstalled(f"no environment {self.name}; `python -m benchmarks.peers FOLDER` makes it")
        return path

    def run(self, script: str, *arguments: str | Path) -> str:
        """Run a script of this folder, on one thread; gives what it prints. Raises `RuntimeError` if it fails."""
        command = [str(self.python), str(HERE / script), *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=env, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            last = lines[-1] if lines else f"exit status {done.returncode}"
            print(done.stderr, file=sys.stderr)
            raise RuntimeError(f"{script} ended with status {done.returncode}: {last}")
        return done.stdout

    def versions(self) -> dict[str, str]:
        """What is installed of the packages that NAME.txt pins."""
        names = [line.split("==")[0] for line in requirements(self.name).read_text("utf-8").split()]
        code = (
            "import sys\nfrom importlib.metadata import version\nfor name in sys.argv[1:]: print(name, version(name))"
        )
        done = subprocess.run([str(self.python), "-c", code, *names], capture_output=True, text=True, check=True)
        return dict(line.split(" ", 1) for line in done.stdout.splitlines())


def requirements(name: str) -> Path:
    return HERE / f"{name}.txt"


def names() -> list[str]:
    """Every peer that has an environment of its own."""
    return sorted(path.stem for path in HERE.glob("*.txt"))


def installed(folder: Path | None) -> dict[str, dict[str, str]]:
    """The versions in each environment that is there, by peer."""
    found = {}
    for name in names():
        try:
            found[name] = Peer(name, folder).versions()
        except NotInstalled:
            continue
    return found


def write_calibration(path: Path, batches: list[dict[str, np.ndarray]]) -> Path:
    """Write batches as the .npz file that the scripts of this folder read."""
    arrays = {f"{place}:{name}": array for place, batch in enumerate(batches) for name, array in batch.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path
