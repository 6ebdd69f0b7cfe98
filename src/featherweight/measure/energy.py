"""Energy: what one inference takes, read off the processor's counters or, where there are none, from a stated model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, PositiveInt

from featherweight.core.axis import Axis, Bench
from featherweight.core.reading import Reading
from featherweight.core.target import Artifact, Work

from .counters import Counter, nvml_counters, rapl_counters, spent
from .inputs import batch_sizes, free_inputs, free_sizes, loaded, sized
from .statistics import Estimate, mean_estimate
from .timing import Call, warm_up

MODEL = "Horowitz 2014, 45 nm"

# Picojoules per operation at 45 nm and 0.9 V: M. Horowitz, "Computing's Energy Problem (and what we can do about
# it)", ISSCC 2014, figure 1.1.9.
PICOJOULES = {
    "int8 add": 0.03,
    "int32 add": 0.1,
    "int8 multiply": 0.2,
    "int32 multiply": 3.1,
    "float16 add": 0.4,
    "float16 multiply": 1.1,
    "float32 add": 0.9,
    "float32 multiply": 3.7,
    "8 bytes from a cache of 8 kB": 10.0,
    "8 bytes from a cache of 32 kB": 20.0,
    "8 bytes from a cache of 1 MB": 100.0,
    "8 bytes from DRAM, at least": 1300.0,
    "8 bytes from DRAM, at most": 2600.0,
}


class Energy(Axis, name="energy"):
    """Measure energy by the counters of processor or card, or model it from operations and bytes where there are none.

    Gives `mj_per_inference` (millijoules for one input) and, for the compressed artifact, `energy_ratio` (original /
    compressed). Measured: all that the processor packages and their memory (RAPL), and the card where it runs them
    (NVML), took while the artifacts ran in alternation at batch 1, idle power and other programs included, divided by
    the runs; Student's t interval over `rounds`. Modelled (`kind` says so, and `conditions` name the model): see
    `modelled`; `low` and `high` are then the ends of the published range for DRAM, not a confidence interval.
    """

    seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    rounds: Annotated[int, Field(ge=2, le=1000)] = 5
    threads: PositiveInt = 1
    counters: str = "/sys/class/powercap"

    def read(self, bench: Bench) -> list[Reading]:
        """Raises `ArtifactError` for a damaged artifact, `TaskError` if the split has no data."""
        if counters := self._counters(bench):
            size = batch_sizes(bench.original.manifest, (1,))[0]
            taken = alternate(loaded(bench, size, self.threads), counters, self.seconds, self.rounds, bench.seed)
            if all(min(joules) > 0 for joules in taken.values()):  # in some virtual machines the counters stand still
                return self._measured(bench, counters, taken, size)
        return _modelled(bench)

    def _counters(self, bench: Bench) -> list[Counter]:
        """What counts the energy of these artifacts: the processor, and the card with it where one runs them."""
        rapl = rapl_counters(Path(self.counters))
        if getattr(bench.original.target, "device", "cpu") == "cpu":
            return rapl
        card = nvml_counters()
        return rapl + card if card else []

    def _measured(
        self, bench: Bench, counters: Sequence[Counter], taken: Mapping[str, list[float]], size: int
    ) -> list[Reading]:
        where = {
            "batch": size,
            "threads": self.threads,
            "counter": ", ".join(counter.name for counter in counters),
        }
        found = []
        for subject in bench.subjects:
            joules = np.array(taken[subject])
            value, low, high = mean_estimate(joules * 1e3 / size)
            rest = {"low": max(0.0, low), "high": high, "n": len(joules), "split": bench.split, "conditions": where}
            found.append(bench.reading(subject, "energy", "mj_per_inference", value, "mJ", **rest))
        if "compressed" in taken:
            value, low, high = ratio(taken["original"], taken["compressed"])
            rest = {"low": low, "high": high, "n": len(taken["original"]), "split": bench.split, "conditions": where}
            found.append(bench.reading("compressed", "energy", "energy_ratio", value, "x", **rest))
        return found


# -- the model --------------------------------------------------------------------------------------------------------
def modelled(work: Work, input_bytes: int, batch: int = 1) -> Estimate:
    """Millijoules of one input, of `batch` together, by the 45 nm table; low and high are the ends of its range for
    DRAM.

    A float multiply-accumulate is a float32 multiply and a float32 addition; an integer one an int8 multiply and an
    int32 addition. Every stored weight byte comes from DRAM once (so do tables of which a few rows are used). Every
    byte of activations (what the runtime's operations give to one another; where the target cannot tell them: the
    model's input) is written to and read from a cache of 1 MB once. What control, addressing and other operations
    cost is left out, so only ratios should be relied on.
    """
    floats = (work.macs - work.integer_macs) * (PICOJOULES["float32 multiply"] + PICOJOULES["float32 add"])
    integers = work.integer_macs * (PICOJOULES["int8 multiply"] + PICOJOULES["int32 add"])
    activations = input_bytes if work.activation_bytes is None else work.activation_bytes
    moved = 2 * activations / 8 * PICOJOULES["8 bytes from a cache of 1 MB"]
    near, far = (work.weight_bytes / 8 * PICOJOULES[f"8 bytes from DRAM, {end}"] for end in ("at least", "at most"))
    rest = floats + integers + moved
    each = 1e-9 / batch
    return Estimate((rest + (near + far) / 2) * each, (rest + near) * each, (rest + far) * each)


def _modelled(bench: Bench) -> list[Reading]:
    estimates, found = {}, []
    for subject, artifact in bench.subjects.items():
        where = _conditions(bench, artifact)
        estimates[subject] = modelled(artifact.manifest.work, _input_bytes(artifact), where["batch"])
        value, low, high = estimates[subject]
        rest = {"low": low, "high": high, "kind": "modelled", "conditions": where}
        found.append(bench.reading(subject, "energy", "mj_per_inference", value, "mJ", **rest))
    if "compressed" in estimates and estimates["compressed"].value > 0:
        value = estimates["original"].value / estimates["compressed"].value
        rest = {"kind": "modelled", "conditions": where}
        found.append(bench.reading("compressed", "energy", "energy_ratio", value, "x", **rest))
    return found


def _conditions(bench: Bench, artifact: Artifact) -> dict[str, Any]:
    counted = "counted" if artifact.manifest.work.activation_bytes is not None else "the input's only"
    batch = batch_sizes(artifact.manifest, (1,))[0]
    return {"model": MODEL, "batch": batch, "activations": counted, **free_sizes(bench, artifact.example())}


def _input_bytes(artifact: Artifact) -> int:
    arrays = sized(artifact.example(), free_inputs(artifact.manifest), 1)
    return sum(array.nbytes for array in arrays.values())


# -- the counters -----------------------------------------------------------------------------------------------------
def alternate(
    calls: Mapping[str, Call], counters: Sequence[Counter], seconds: float, rounds: int, seed: int = 0
) -> dict[str, list[float]]:
    """Joules per run of each call, one entry per round; `seconds` is for all calls and rounds together."""
    share = seconds / (rounds * len(calls))
    for call in calls.values():
        warm_up(call, limit=share)
    generator = np.random.default_rng(seed)
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in generator.permutation(list(calls)):
            taken[name].append(_joules(calls[name], counters, share))
    return taken


def _joules(call: Call, counters: Sequence[Counter], seconds: float) -> float:
    before, runs, start = [counter.read() for counter in counters], 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < seconds:
        call()
        runs += 1
    return 1e-6 * sum(spent(then, counter.read(), counter.limit) for then, counter in zip(before, counters)) / runs


def ratio(original: Sequence[float], compressed: Sequence[float]) -> Estimate:
    """Energy of the original over that of the compressed artifact: geometric mean over rounds, with Student's t."""
    return Estimate(*(float(np.exp(part)) for part in mean_estimate(np.log(original) - np.log(compressed))))
