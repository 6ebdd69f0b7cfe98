"""A step: one compression method with its settings."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from . import registry
from .errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from .context import Context
    from .task import Task


class Trait(enum.Flag):
    """What is still possible with a model: exchange its modules, change its dimensions, train it."""

    EDITABLE = enum.auto()
    RESHAPABLE = enum.auto()
    TRAINABLE = enum.auto()


ALL_TRAITS = Trait.EDITABLE | Trait.RESHAPABLE | Trait.TRAINABLE
NO_TRAITS = Trait(0)


class Place(enum.IntEnum):
    """Where a step belongs in a recipe that the search builds; steps of one place exclude each other there."""

    RESHAPE = 1
    SPARSIFY = 2
    HEAL = 3
    ENCODE = 4


@dataclass(frozen=True)
class Between:
    """The range of a number that the search explores, beside the setting itself: `Annotated[float, Between(0.1,
    0.9)]`.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class OneOf:
    """The values that the search explores: `Annotated[str, OneOf("l1", "taylor")]`."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any):
        object.__setattr__(self, "values", values)


class Step(BaseModel):
    """One compression method with its settings: a frozen value that turns a model into a model.

    A method is a subclass in a file of its own: `class WeightPruning(Step, kind="prune.weights")`. Its docstring's
    first sentence says what it does to the model, `paper` where it comes from. `apply` may change and return the model
    it is given (a copy).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kinds: ClassVar[dict[str, type[Step]]] = {}
    kind: ClassVar[str] = ""
    needs: ClassVar[Trait] = Trait.EDITABLE
    takes: ClassVar[Trait] = NO_TRAITS
    makes: ClassVar[frozenset[str]] = frozenset()  # forms of encodings that a target must carry
    paper: ClassVar[str] = ""
    place: ClassVar[Place | None] = None  # None: the search does not use it by itself
    gains: ClassVar[frozenset[str]] = frozenset({"latency", "size", "energy"})  # objectives that the search uses it for
    packages: ClassVar[tuple[str, ...]] = ()  # that must be installed beside those of this package...
    extra: ClassVar[str] = ""  # ...by this extra
    trains: ClassVar[bool] = False
    begins: ClassVar[bool] = False  # puts another model in place, so that it can only stand first in a recipe

    def __init_subclass__(cls, kind: str = "", **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if kind:
            cls.kind = kind
            Step.kinds[kind] = cls

    def apply(self, model: nn.Module, ctx: Context) -> nn.Module:
        """Return the changed model; report every layer that was left alone through `ctx.leave`."""
        raise NotImplementedError(f"{type(self).__name__} must say what it does")

    def architecture(self, task: Task) -> nn.Module | None:
        """A model of the structure that this step puts in the place of the task's; None where it goes on with that."""
        return None

    def forms(self) -> frozenset[str]:
        """The forms of encodings that this step, as it is set, may leave in the model."""
        return self.makes

    def ended(self) -> Trait:
        """What is no longer possible after this step, as it is set: `takes`, or less."""
        return self.takes

    @property
    def training(self) -> bool:
        """Whether this step, as it is set, runs epochs of training."""
        return self.trains or getattr(self, "retrain", None) is not None

    @classmethod
    def missing(cls) -> list[str]:
        """The packages that this step needs and that are not installed."""
        import importlib.util

        return [package for package in cls.packages if importlib.util.find_spec(package) is None]

    @property
    def timed(self) -> bool:
        """Whether this step, as it is set, measures seconds on the target."""
        return getattr(self, "of", None) == "latency"

    def dump(self) -> dict[str, Any]:
        """The mapping that stands for this step in a recipe: kind, and settings that differ from the defaults."""
        return {"kind": self.kind, **self.model_dump(mode="json", exclude_defaults=True)}

    def full(self) -> dict[str, Any]:
        """Kind and every setting, defaults included: what a digest is made of."""
        return {"kind": self.kind, **self.model_dump(mode="json")}


def step(kind: str, **settings: Any) -> Step:
    """The step called `kind` with these settings; unknown names and values out of range raise `RecipeError` in one
    line.
    """
    registry.load("methods")
    if kind not in Step.kinds:
        raise RecipeError(f"there is no method {kind!r}; the methods are: {', '.join(sorted(Step.kinds))}")
    try:
        return Step.kinds[kind](**settings)
    except ValidationError as error:
        raise RecipeError(f"{kind}: {one_line(error)}") from error


def one_line(error: ValidationError) -> str:
    """All problems of a pydantic error in one line: which setting, what is wrong, what was given."""
    parts = []
    for problem in error.errors(include_url=False):
        name = ".".join(str(part) for part in problem["loc"]) or "value"
        if problem["type"] == "extra_forbidden":
            parts.append(f"there is no setting {name!r}")
        else:
            parts.append(f"{name}={problem.get('input')!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}")
    return "; ".join(parts)


def knobs(kind: type[Step]) -> dict[str, Between | OneOf]:
    """What the search may vary in a step of this kind: setting -> range."""
    found: dict[str, Between | OneOf] = {}
    for name, field in kind.model_fields.items():
        for extra in [*field.metadata, *_annotations(field.annotation)]:
            if isinstance(extra, Between | OneOf):
                found[name] = extra
    return found


def _annotations(kind: Any) -> list[Any]:
    """What stands beside a type in `Annotated`, also where None may stand instead of the type."""
    if get_origin(kind) is Annotated:
        return list(get_args(kind)[1:])
    if get_origin(kind) in (Union, UnionType):
        return [extra for member in get_args(kind) for extra in _annotations(member)]
    return []
