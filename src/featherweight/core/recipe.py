"""A recipe: an ordered list of steps, as data."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .errors import MissingExtra, NotCarried, RecipeError
from .files import value_digest, write_text
from .step import ALL_TRAITS, Step, Trait, step

if TYPE_CHECKING:
    from torch import nn

    from .target import Target
    from .task import Task


class Recipe:
    """An ordered list of steps with an optional name and notes; equal recipes have equal digests."""

    def __init__(self, steps: Iterable[Step | dict[str, Any]] = (), name: str = "", notes: str = ""):
        self.steps: tuple[Step, ...] = tuple(
            item if isinstance(item, Step) else _step(item, place) for place, item in enumerate(steps, 1)
        )
        self.name, self.notes = name, notes

    @classmethod
    def parse(cls, value: Any, source: str = "recipe") -> Recipe:
        """A recipe from the mapping that its YAML holds; anything unknown is refused by name."""
        if not isinstance(value, dict):
            raise RecipeError(f"{source}: a recipe is a mapping with 'steps', this is {type(value).__name__}")
        unknown = sorted(str(key) for key in set(value) - {"steps", "name", "notes"})
        if unknown:
            raise RecipeError(
                f"{source}: there is no entry {unknown[0]!r} in a recipe; the entries are steps, name, notes"
            )
        steps = value.get("steps")
        if not isinstance(steps, list) or not steps:
            raise RecipeError(f"{source}: 'steps' must be a list of at least one step")
        return cls(steps, name=str(value.get("name") or ""), notes=str(value.get("notes") or ""))

    @classmethod
    def read(cls, path: str | Path) -> Recipe:
        """A recipe from a YAML file, or one of the named recipes that ship with the package."""
        named = Path(__file__).parent.parent / "recipes" / f"{path}.yaml"
        file = Path(path)
        if not file.is_file():
            if not named.is_file():
                known = ", ".join(sorted(item.stem for item in named.parent.glob("*.yaml")))
                raise RecipeError(f"there is no recipe file {path}; the named recipes are: {known}")
            file = named
        try:
            value = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        return cls.parse(value, str(path))

    def dump(self) -> dict[str, Any]:
        """The mapping that `parse` reads back."""
        head = {key: value for key, value in (("name", self.name), ("notes", self.notes)) if value}
        return {**head, "steps": [item.dump() for item in self.steps]}

    def write(self, path: Path) -> None:
        write_text(path, yaml.safe_dump(self.dump(), sort_keys=False))

    def digest(self) -> str:
        """SHA-256 over kinds and all settings in order; name and notes do not count."""
        return value_digest([item.full() for item in self.steps])

    def check(self, target: Target | None = None) -> None:
        """Refuse, before any work starts, an order that cannot work or a form that `target` does not carry."""
        have = ALL_TRAITS
        taken: dict[Trait, int] = {}
        for place, item in enumerate(self.steps, 1):
            if item.begins and place > 1:
                raise RecipeError(
                    f"step {place} ({item.kind}) puts another model in place, which undoes step {place - 1} "
                    f"({self.steps[place - 2].kind}); put {item.kind} first"
                )
            if missing := type(item).missing():
                raise MissingExtra(
                    f"step {place} ({item.kind}) needs {', '.join(missing)}; "
                    f"run: pip install 'featherweight[{type(item).extra}]'"
                )
            for trait in type(item).needs & ~have:
                raise RecipeError(
                    f"step {place} ({item.kind}) needs a model that is still {str(trait.name).lower()}, "
                    f"but step {taken[trait]} ({self.steps[taken[trait] - 1].kind}) ended that; "
                    f"put {item.kind} before it"
                )
            for trait in item.ended() & have:
                taken[trait] = place
            have &= ~item.ended()
            if target is not None:
                for form in target.refuses(item.forms()):
                    raise NotCarried(
                        f"step {place} ({item.kind}) stores weights as {form}, which the target {target.name} "
                        f"does not carry; it carries: {', '.join(sorted(target.carries)) or 'plain floats only'}"
                    )

    def architecture(self, task: Task) -> nn.Module:
        """A model of the structure that the steps start from: the task's own, unless the first puts another there."""
        made = self.steps[0].architecture(task) if self.steps else None
        return task.original if made is None else made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())

    def __str__(self) -> str:
        return " + ".join(_brief(item) for item in self.steps) or "nothing"

    def __repr__(self) -> str:
        return f"Recipe({self})"


def _step(item: Any, place: int) -> Step:
    if not isinstance(item, dict) or not isinstance(item.get("kind"), str):
        raise RecipeError(
            f"step {place} must be a mapping with a 'kind', such as {{kind: quantize.static}}; it is {item!r}"
        )
    settings = {str(key): value for key, value in item.items() if key != "kind"}
    try:
        return step(item["kind"], **settings)
    except RecipeError as error:
        raise RecipeError(f"step {place}: {error}") from error


def _brief(item: Step) -> str:
    settings = {key: value for key, value in item.dump().items() if key != "kind"}
    text = ", ".join(
        f"{key}={round(value, 3) if isinstance(value, float) else value}" for key, value in settings.items()
    )
    return f"{item.kind}({text})" if text else item.kind
