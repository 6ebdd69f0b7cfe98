"""An axis: one thing that is measured on artifacts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import RecipeError
from .machine import describe
from .progress import Progress
from .reading import Reading, Subject
from .step import one_line
from .target import Artifact
from .task import Split, Task


@dataclass
class Bench:
    """What an axis may read: the deployed artifacts (original, and compressed if there is one) and the task's data. No
    torch model.
    """

    task: Task
    original: Artifact
    compressed: Artifact | None = None
    split: Split = "test"
    seed: int = 0
    progress: Progress = field(default_factory=Progress)

    @property
    def subjects(self) -> dict[Subject, Artifact]:
        """The artifacts by the name that their readings carry."""
        found: dict[Subject, Artifact] = {"original": self.original}
        if self.compressed is not None:
            found["compressed"] = self.compressed
        return found

    def reading(self, subject: Subject, axis: str, name: str, value: float, unit: str, **rest: Any) -> Reading:
        """A `Reading` with runtime and machine filled in."""
        artifact = self.subjects[subject]
        runtime = " ".join(
            [
                artifact.manifest.target["name"],
                *(artifact.manifest.versions.get(package, "") for package in artifact.target.packages[:1]),
            ]
        )
        return Reading(
            subject=subject, axis=axis, name=name, value=value, unit=unit, runtime=runtime, machine=describe(), **rest
        )


class Axis(BaseModel, ABC):
    """One file, one axis: reads artifacts and gives `Reading`s. Its docstring's first sentence says what it measures
    and how.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kinds: ClassVar[dict[str, type[Axis]]] = {}
    name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if name:
            cls.name = name
            Axis.kinds[name] = cls

    @abstractmethod
    def read(self, bench: Bench) -> list[Reading]:
        """Measure every subject of `bench`, interleaved where time counts."""


def axis(name: str, **settings: Any) -> Axis:
    """The axis called `name` with these settings; raises `RecipeError` if it is unknown."""
    from . import registry

    registry.load("axes")
    if name not in Axis.kinds:
        raise RecipeError(f"there is no axis {name!r}; the axes are: {', '.join(sorted(Axis.kinds))}")
    try:
        return Axis.kinds[name](**settings)
    except ValidationError as error:
        raise RecipeError(f"axis {name}: {one_line(error)}") from error
