"""How the time of a run is shared out: what is set aside for its end, what a trial costs, how long a step may train."""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

from ..core.data import is_map_style
from ..core.recipe import Recipe
from .clock import Clock, batches_per_epoch, epochs_of, seconds_per_epoch
from .judge import Judge
from .study import Study

SHARES = 4  # trained trials that the time for searching should allow
FIRST_TRIALS = 4  # are tried even if the time is over, until one of them is done
ENOUGH = 0.15  # of the longest training, for a trial to be worth its time
HEAT = 1.5  # trials' worth of time for the fastest few side by side
SLACK = 1.1  # estimates are upper ones, so that a trial may be started that needs this much of what is left
LONGEST_STEPS = 2000  # of training in one step of a recipe, where the data set is so small that its epochs are short
LAUNCHES = 8  # processes that the axis memory starts, and one to spare
AXES_SECONDS = 12.0  # what the other axes take at the end on a small model
TIMED_RUNS = 1200  # runs on one input that the latency axis is worth, batch 32 included


@dataclass
class Allowance:
    """Seconds and epochs that are left, from what was measured on this machine during this run."""

    judge: Judge
    study: Study
    clock: Clock

    @property
    def limited(self) -> bool:
        return self.clock.limit is not None

    def over(self) -> bool:
        """Whether not even a trial without training fits any more. Until one is done a few are tried whatever the
        time, for without any there would be no result at all.
        """
        trials = self.study.finished()
        if any(trial.state == "done" for trial in trials):
            return self.limited and self.left() < self.overhead()
        return len(trials) >= FIRST_TRIALS and self.clock.left <= 0

    def fits_heat(self) -> bool:
        """Whether there is time to export the fastest few again and to time them side by side."""
        return not self.limited or self.left() > -HEAT * self.overhead()

    def left(self) -> float:
        """Seconds left for trials. Set aside: the artifact after each step, accuracy on the test split, the other
        axes.
        """
        axes = AXES_SECONDS + LAUNCHES * launch_seconds() + TIMED_RUNS * 2 * self.judge.latency_ms / 1e3
        return self.clock.left - axes - (3 + HEAT) * self.overhead() - 2 * self._test_seconds()

    def overhead(self) -> float:
        """Seconds that a trial takes apart from training: the median of those that did not train, else what the
        original took.
        """
        done = [trial for trial in self.study.finished() if trial.state == "done" and not trial.trains]
        measured = [trial.seconds for trial in done if not trial.copied]
        return statistics.median(measured) if measured else self.judge.seconds

    def longest(self) -> float:
        """Epochs that make `LONGEST_STEPS` training steps; 0 for a task without training data."""
        task = self.judge.task
        if not task.has("train"):
            return 0.0
        return LONGEST_STEPS / float(self.study.note("steps_per_epoch", lambda: batches_per_epoch(task)))

    def epochs(self) -> float:
        """Epochs that one trial may train: as planned once for this time limit, so that several trials fit, and never
        more than is left now.
        """
        left, overhead, per_epoch = self.left(), self.overhead(), self._per_epoch()
        enough = ENOUGH * self.longest()
        name = f"epochs within {self.clock.limit} s"  # a resumed run with another limit shares its time out anew
        planned = float(self.study.note(name, lambda: shared_epochs(left, overhead, per_epoch, enough)))
        return min(planned, max(0.0, (left - overhead) / per_epoch))

    def refusal(self, recipe: Recipe) -> str:
        """Why `recipe` cannot be trained in what is left; empty if it can, or if it does not train."""
        epochs = sum(epochs_of(item) for item in recipe.steps)
        if not self.limited or not epochs:
            return ""
        needed, left = epochs * self._per_epoch() + self.overhead(), max(0.0, self.left())
        return f"it would take about {needed:.0f} s, and {left:.0f} s are left" if needed > left * SLACK else ""

    def _per_epoch(self) -> float:
        judge = self.judge
        return float(self.study.note("seconds_per_epoch", lambda: seconds_per_epoch(judge.task, judge.job.seed)))

    def _test_seconds(self) -> float:
        """Seconds that one pass over the test split takes, by the original's pass over the validation split."""
        task = self.judge.task
        if not task.has("test"):
            return self.judge.validation_seconds
        return self.judge.validation_seconds * _length(task.test, 1) / max(1, _length(task.validate, 1))


def shared_epochs(left: float, overhead: float, per_epoch: float, enough: float) -> float:
    """Epochs for each trained trial when `left` seconds are shared among as many as can have `enough`: from four down
    to one.
    """
    for shares in range(SHARES, 0, -1):
        epochs = max(0.0, (left / shares - overhead) / per_epoch)
        if epochs >= enough:
            return epochs
    return epochs


@functools.cache
def launch_seconds() -> float:
    """What it costs here to start a Python process that can run an artifact."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import numpy, featherweight.core.target"], check=True)
    return time.perf_counter() - start


def _length(data: object, otherwise: int) -> int:
    """Inputs in a map-style data set, batches in a list of batches, else `otherwise`."""
    return len(data) if is_map_style(data) or hasattr(data, "__len__") else otherwise  # type: ignore[arg-type]
