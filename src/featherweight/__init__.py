"""Make a trained PyTorch model small, fast and cheap to run, and prove it on the artifact that will be deployed.

Everything a user needs is here and is loaded when it is first asked for: importing the package loads neither torch
nor onnx nor optuna.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Result, apply, compress, diagnose, load, load_adapter, measure, pack, save, save_adapter, unpack
    from .core.axis import Axis, Bench
    from .core.context import Context
    from .core.data import Arrays
    from .core.diagnosis import Diagnosis
    from .core.encoding import Encoding
    from .core.errors import (
        ArtifactError,
        FeatherweightError,
        Infeasible,
        MissingExtra,
        NoEffect,
        NotCarried,
        NotFinite,
        OutputError,
        RecipeError,
        TaskError,
    )
    from .core.fit import Training
    from .core.metric import Metric
    from .core.progress import Progress
    from .core.reading import Reading
    from .core.recipe import Recipe
    from .core.run import Budget, Run
    from .core.step import Between, OneOf, Place, Step, Trait
    from .core.target import Artifact, Target
    from .core.task import Task, ready_made

    __version__: str

_HOMES = {
    "api": (
        "Result",
        "apply",
        "compress",
        "diagnose",
        "load",
        "load_adapter",
        "measure",
        "pack",
        "save",
        "save_adapter",
        "unpack",
    ),
    "core.axis": ("Axis", "Bench"),
    "core.context": ("Context",),
    "core.data": ("Arrays",),
    "core.diagnosis": ("Diagnosis",),
    "core.encoding": ("Encoding",),
    "core.errors": (
        "ArtifactError",
        "FeatherweightError",
        "Infeasible",
        "MissingExtra",
        "NoEffect",
        "NotCarried",
        "NotFinite",
        "OutputError",
        "RecipeError",
        "TaskError",
    ),
    "core.fit": ("Training",),
    "core.metric": ("Metric",),
    "core.progress": ("Progress",),
    "core.reading": ("Reading",),
    "core.recipe": ("Recipe",),
    "core.run": ("Budget", "Run"),
    "core.step": ("Between", "OneOf", "Place", "Step", "Trait"),
    "core.target": ("Artifact", "Target"),
    "core.task": ("Task", "ready_made"),
}
_WHERE = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Arrays",
    "Artifact",
    "ArtifactError",
    "Axis",
    "Bench",
    "Between",
    "Budget",
    "Context",
    "Diagnosis",
    "Encoding",
    "FeatherweightError",
    "Infeasible",
    "Metric",
    "MissingExtra",
    "NoEffect",
    "NotCarried",
    "NotFinite",
    "OneOf",
    "OutputError",
    "Place",
    "Progress",
    "Reading",
    "Recipe",
    "RecipeError",
    "Result",
    "Run",
    "Step",
    "Target",
    "Task",
    "TaskError",
    "Training",
    "Trait",
    "__version__",
    "apply",
    "compress",
    "diagnose",
    "load",
    "load_adapter",
    "measure",
    "pack",
    "ready_made",
    "save",
    "save_adapter",
    "unpack",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("featherweight")
    if name not in _WHERE:
        raise AttributeError(f"module 'featherweight' has no attribute {name!r}")
    return getattr(import_module(f"featherweight.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """This package, whose `measure` is the function even after the import of the folder of that name has set the
    attribute.
    """

    @property
    def measure(self) -> Any:
        return __getattr__("measure")

    @measure.setter
    def measure(self, module: ModuleType) -> None:
        """The import machinery sets the folder here; it stays in `sys.modules`, which is all that imports need."""


sys.modules[__name__].__class__ = _Package
