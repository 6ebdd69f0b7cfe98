"""A task, three methods and a runtime that take milliseconds, for tests of the search; run as a program it searches.

They stand beside the registered ones only where a test puts them there, so that no contract test meets them.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import parametrize

from featherweight.core import registry
from featherweight.core.context import Context
from featherweight.core.data import Arrays
from featherweight.core.encoding import Affine
from featherweight.core.errors import ArtifactError, NoEffect
from featherweight.core.fit import Training
from featherweight.core.run import Budget
from featherweight.core.step import Between, OneOf, Place, Step, Trait
from featherweight.core.target import Session, Target, Work
from featherweight.core.task import Task
from featherweight.model.rounding import Rounding

HIDDEN = 64


class Narrow(Step):
    """Keep the hidden units with the largest outgoing weights."""

    kind: ClassVar[str] = "tiny.narrow"
    place: ClassVar[Place | None] = Place.RESHAPE
    needs: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    keep: Annotated[float, Field(gt=0, lt=1), Between(0.05, 0.95)] = 0.5

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        first, last = model[0], model[2]
        count = max(1, round(self.keep * first.out_features))
        if count == first.out_features:
            raise NoEffect("every unit would be kept")
        kept = last.weight.detach().abs().sum(0).argsort(descending=True)[:count].sort().values
        narrow, out = nn.Linear(first.in_features, count), nn.Linear(count, last.out_features)
        with torch.no_grad():
            narrow.weight.copy_(first.weight[kept])
            narrow.bias.copy_(first.bias[kept])
            out.weight.copy_(last.weight[:, kept])
            out.bias.copy_(last.bias)
        ctx.change("0", f"{first.out_features} -> {count}")
        return nn.Sequential(narrow, model[1], out)


class Heal(Step):
    """Train for a little."""

    kind: ClassVar[str] = "tiny.heal"
    place: ClassVar[Place | None] = Place.HEAL
    needs: ClassVar[Trait] = Trait.TRAINABLE
    trains: ClassVar[bool] = True
    epochs: Annotated[float, Field(gt=0), Between(0.5, 2)] = 1.0
    lr: Annotated[float, OneOf(1e-3, 1e-2)] = 1e-2

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        ctx.fit(model, Training(epochs=self.epochs, lr=self.lr))
        return model


class Round(Step):
    """Store weights as 8-bit integers."""

    kind: ClassVar[str] = "tiny.round"
    place: ClassVar[Place | None] = Place.ENCODE
    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = Trait.EDITABLE | Trait.RESHAPABLE
    makes: ClassVar[frozenset[str]] = frozenset({"int8"})
    per_row: Annotated[bool, OneOf(True, False)] = True

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        for layer in (model[0], model[2]):
            largest = layer.weight.detach().abs().amax(1) if self.per_row else layer.weight.detach().abs().amax()
            link = Rounding((largest / 127).clamp_min(1e-9), axis=0 if self.per_row else None)
            parametrize.register_parametrization(layer, "weight", link)
        return model


class Fails(Step):
    """Always fail."""

    kind: ClassVar[str] = "tiny.fails"
    place: ClassVar[Place | None] = Place.ENCODE

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        raise RuntimeError("this method\nnever works")


class Zeros(Step):
    """Zeros that a target would have to store as such."""

    kind: ClassVar[str] = "tiny.zeros"
    place: ClassVar[Place | None] = Place.SPARSIFY
    sparsity: Annotated[float, Between(0.1, 0.9)] = 0.5


class Tiny(Target):
    """Two linear layers in numpy, stored as an .npz file."""

    file: ClassVar[str] = "model.npz"
    carries: ClassVar[frozenset[str]] = frozenset({"int8"})

    def write(self, plain: nn.Module, stored: Any, example: Any, free: Any, path: Path) -> None:
        arrays = {}
        for name, parameter in plain.named_parameters():
            encoding = stored.get(name)
            if isinstance(encoding, Affine):
                arrays[name], arrays[f"{name}:scale"] = encoding.values.numpy(), encoding.scale.numpy()
            else:
                arrays[name] = parameter.detach().numpy()
        with path.open("wb") as file:
            np.savez(file, **arrays)

    def load(self, path: Path, threads: int = 1) -> Session:
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        weights = {name: _decoded(arrays, name) for name in arrays if not name.endswith(":scale")}

        def session(**inputs: np.ndarray) -> list[np.ndarray]:
            x = next(iter(inputs.values())).reshape(-1, 64)
            hidden = np.maximum(x @ weights["0.weight"].T + weights["0.bias"], 0)
            return [hidden @ weights["2.weight"].T + weights["2.bias"]]

        return session

    def stored(self, path: Path) -> dict[str, str]:
        with np.load(path) as file:
            return {name: str(file[name].dtype) for name in file.files if not name.endswith(":scale")}

    def work(self, path: Path, example: dict[str, np.ndarray]) -> Work:
        with np.load(path) as file:
            sizes = {name: file[name] for name in file.files if not name.endswith(":scale")}
        macs = sum(array.size for array in sizes.values() if array.ndim == 2)
        count = sum(array.size for array in sizes.values())
        return Work(parameters=count, macs=macs, weight_bytes=sum(array.nbytes for array in sizes.values()))


Tiny.name = "tiny"


def _decoded(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    scale = arrays.get(f"{name}:scale")
    if scale is None:
        return arrays[name]
    return arrays[name].astype(np.float32) * (scale[:, None] if scale.ndim else scale)


@contextlib.contextmanager
def registered(*kinds: type[Step]) -> Iterator[None]:
    """Within it only these methods exist, and the target "tiny" does."""
    registry.load("methods")
    registry.load("targets")
    steps, targets = dict(Step.kinds), dict(Target.kinds)
    Step.kinds.clear()
    Step.kinds.update({kind.kind: kind for kind in kinds})
    Target.kinds["tiny"] = Tiny
    try:
        yield
    finally:
        Step.kinds.clear()
        Step.kinds.update(steps)
        Target.kinds.clear()
        Target.kinds.update(targets)


@functools.cache
def task() -> Task:
    """scikit-learn's digits: 400 to train, 300 to validate, 300 to test; a network of two layers, trained here."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().flatten(1) / 16
    labels = torch.from_numpy(found.target).long()
    part = {"train": (0, 400), "validate": (400, 700), "test": (700, 1000)}
    splits = {name: Arrays(images[low:high], labels[low:high]) for name, (low, high) in part.items()}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))
    start = Task(name="tiny", model=model, **splits)
    Context(start, device=torch.device("cpu")).fit(model, Training(epochs=20, lr=1e-2))
    return Task(name="tiny", model=model.eval(), source="tiny_search:task", **splits)


def search(out: str, trials: str, cache: str) -> None:
    """Search in `out` with the models between steps in `cache`, and print the digest of the chosen recipe."""
    from featherweight.core.recipe import Recipe
    from featherweight.search import allowance, judge
    from featherweight.search.pipeline import compress

    judge.TIMING_SECONDS, allowance.LONGEST_STEPS = 0.02, 20
    os.environ["FEATHERWEIGHT_CACHE"] = cache
    with registered(Narrow, Heal, Round, Fails):
        budget = Budget(objective="size", max_drop=2.0)
        run = compress(task(), Tiny(), budget, Path(out), trials=int(trials), axes=["accuracy", "size"])
        print("done", Recipe.parse(run.recipe).digest(), flush=True)


def serve() -> None:
    """For each line "out trials cache": fork, print the child's process id, let it search there, print how it ended.

    A search that is to be killed many times is started so in milliseconds, with everything imported.
    """
    import featherweight.search.pipeline  # noqa: F401

    torch.set_num_threads(1)
    task().digest  # noqa: B018  the network is trained once, before any fork
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            search(*line.split())
            os._exit(0)
        print("pid", child, flush=True)
        _, status = os.waitpid(child, 0)
        print("end", os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
