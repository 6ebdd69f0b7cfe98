"""Models that are trained on the spot: once per machine, seeded, and kept in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from ..core.context import Context
from ..core.fit import Training
from ..core.task import Task
from .source import cached, version_of_torch

THREADS = 1  # a fixed number: sums over another number round otherwise; one thread is not slowed by a busy machine


def trained(task: Task, make: Callable[[], nn.Module], training: Training, seed: int = 0) -> Callable[[], nn.Module]:
    """A function that gives `make()` trained on `task`'s training data by its loss.

    The first call trains on one thread of the CPU; later ones read the weights from the cache, in which
    `task.fingerprint` stands for the data.
    """

    def model() -> nn.Module:
        made = initial(make, seed)
        key: list[object] = [
            task.fingerprint,
            str(made),
            training.model_dump(mode="json"),
            seed,
            THREADS,
            version_of_torch(),
        ]
        made.load_state_dict(cached(f"{task.name}-weights", key, lambda: fitted(task, made, training, seed)))
        return made.eval()

    return model


def initial(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`make()` with initial weights that depend on `seed` alone; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def fitted(task: Task, model: nn.Module, training: Training, seed: int) -> dict[str, torch.Tensor]:
    """Train `model` in place and give its state."""
    ctx = Context(task=replace(task, model=model), seed=seed, device=torch.device("cpu"))
    with threads(THREADS):
        ctx.fit(model, training, text=f"training {task.name}")
    return dict(model.state_dict())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
