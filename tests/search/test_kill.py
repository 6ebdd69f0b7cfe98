"""A search that is killed at any moment goes on where it was, and ends as one that was left in peace."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tiny_search import Fails, Heal, Narrow, Round, registered

from featherweight.core.target import Artifact
from featherweight.model import skeleton
from featherweight.search.pipeline import read_run

SERVER = Path(__file__).with_name("tiny_search.py")


class Searches:
    """Searches in processes of their own, started quickly, and killed if need be."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == ["ready"]

    def run(self, out: Path, trials: int, cache: Path, kill_after: float | None = None) -> tuple[int, str]:
        """The exit code of a search and the digest that it printed; killed (-9) after some seconds if asked."""
        assert self.process.stdin is not None
        print(out, trials, cache, file=self.process.stdin, flush=True)
        child = int(self._line()[1])
        timer = threading.Timer(kill_after or 0, lambda: _kill(child))
        if kill_after is not None:
            timer.start()
        found = ""
        while (words := self._line())[0] != "end":
            found = words[-1] if words[0] == "done" else found
        timer.cancel()
        return int(words[1]), found

    def _line(self) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server of searches has died"
        return line.split()


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


@pytest.fixture(scope="module")
def searches() -> Iterator[Searches]:
    found = Searches()
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    assert found.process.wait(30) == 0


def nothing_half_written(out: Path) -> None:
    """Whatever is visible in `out` can be read from end to end."""
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    for folder in (out / "artifact", out / "original"):
        if folder.exists():
            Artifact(folder).verify()
    if (out / "model").exists():
        skeleton.load(out / "model")
    if (out / "recipe.yaml").exists():
        assert yaml.safe_load((out / "recipe.yaml").read_text())["steps"]
    if (out / "run.json").exists():
        assert {"artifact", "original", "model", "recipe.yaml", "readings.json"} <= {
            path.name for path in out.iterdir()
        }
        read_run(out)


def killed_and_resumed(searches: Searches, folder: Path, trials: int, kills: int, seed: int) -> None:
    started = time.perf_counter()
    code, undisturbed = searches.run(folder / "calm", trials, folder / "cache1")
    taken = time.perf_counter() - started
    assert code == 0 and undisturbed
    generator, done = random.Random(seed), 0
    out = folder / "killed"
    while done < kills:
        code, found = searches.run(out, trials, folder / "cache2", generator.uniform(0.02, 1.2 * taken / kills))
        if code == 0:  # it came to its end before it was hit: the rest of the kills hit a search of another folder
            assert found == undisturbed
            out = folder / f"killed{done}"
            continue
        assert code == -signal.SIGKILL
        done += 1
        if out.exists():
            nothing_half_written(out)
    code, found = searches.run(out, trials, folder / "cache2")
    assert code == 0 and found == undisturbed
    with registered(Narrow, Heal, Round, Fails):
        calm, resumed = read_run(folder / "calm"), read_run(out)
    facts = ("number", "recipe", "state", "reason", "accuracy", "drop", "drop_high", "bytes", "feasible", "chosen")
    assert [[getattr(item, fact) for fact in facts] for item in calm.candidates] == [
        [getattr(item, fact) for fact in facts] for item in resumed.candidates
    ]
    assert not list(out.glob(".*.part")) and not (out / ".work").exists()


def test_two_kills(searches: Searches, tmp_path: Path) -> None:
    killed_and_resumed(searches, tmp_path, trials=5, kills=2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_ten_kills(searches: Searches, tmp_path: Path, seed: int) -> None:
    killed_and_resumed(searches, tmp_path, trials=24, kills=10, seed=seed)
