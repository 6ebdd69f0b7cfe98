"""A contender: one way to make a deployable ONNX file from the same network and the same calibration data."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from featherweight.core.target import Artifact
from featherweight.core.task import Task

Make = Callable[["Material"], Path]


@dataclass(frozen=True)
class Material:
    """What every contender of a network is handed.

    `original` is the float artifact that all start from, `calibration` holds batches of arrays by input name, `folder`
    is the contender's own place to write. The file that it returns has the inputs and outputs of `original`. `peers` is
    the folder of the environments of those that do not run in ours; what a contender adds to `notes` goes beside its
    figures. One that loses more than `max_drop` percent of the original's figure does
    not count as fast, and `clock` says how that is timed.
    """

    task: Task
    original: Artifact
    calibration: list[dict[str, np.ndarray]]
    folder: Path
    seed: int = 0
    max_drop: float = 0.5
    peers: Path | None = None
    clock: str = "wall"
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Contender:
    """A package with one of its methods: its name, the package that is installed, and how it makes its file."""

    name: str
    package: str
    about: str
    make: Make


contenders: dict[str, Contender] = {}


def one_length(batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The same inputs, padded behind with zeros to one length where an attention mask says what is padding.

    Calibration that keeps all activations stacks them, and fails on lengths that differ.
    """
    longest = max((batch["attention_mask"].shape[1] for batch in batches if "attention_mask" in batch), default=0)
    return [
        {
            name: np.pad(array, ((0, 0), (0, longest - array.shape[1]))) if longest else array
            for name, array in batch.items()
        }
        for batch in batches
    ]


def singles(batches: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
    """The same inputs, each as a batch of its own."""
    return [
        {name: array[place : place + 1] for name, array in batch.items()}
        for batch in batches
        for place in range(len(next(iter(batch.values()))))
    ]


def contender(name: str, package: str) -> Callable[[Make], Make]:
    """Register a function as a contender; its docstring says, in a sentence, with which settings it runs."""

    def register(make: Make) -> Make:
        contenders[name] = Contender(name, package, " ".join((make.__doc__ or "").split()), make)
        return make

    return register


def load() -> dict[str, Contender]:
    """Every contender of every module in `benchmarks.contenders`, by name."""
    package = importlib.import_module("benchmarks.contenders")
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(found.name)
    return contenders
