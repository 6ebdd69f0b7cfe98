"""What there is: the registered methods, targets, axes and tasks as plain records, for the command line to show."""

from __future__ import annotations

import importlib.util
import inspect
import os
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .core import registry
from .core.axis import Axis
from .core.step import Between, OneOf, Step
from .core.target import Target
from .core.task import ReadyMade, zoo

Entry = dict[str, Any]
BOUNDS = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "a multiple of"))


def methods() -> list[Entry]:
    """Every method: kind, what it does, paper, settings, and what it lacks here."""
    registry.load("methods")
    return [
        _entry(name, kind) | {"paper": kind.paper, "stores": sorted(kind.makes), "trains": kind.trains}
        for name, kind in sorted(Step.kinds.items())
    ]


def targets() -> list[Entry]:
    """Every target: name, what it is, the forms of weights that it carries, settings, and what it lacks here."""
    registry.load("targets")
    return [_entry(name, kind) | {"carries": sorted(kind.carries)} for name, kind in sorted(Target.kinds.items())]


def axes() -> list[Entry]:
    """Every axis: name, what it measures and how, settings, and what it lacks here."""
    registry.load("axes")
    return [_entry(name, kind) for name, kind in sorted(Axis.kinds.items())]


def tasks() -> list[Entry]:
    """Every ready-made task: the name to give on the command line, what it is, and what it lacks here."""
    registry.load("tasks")
    return [_task(name, made) for name, made in sorted(zoo.items())]


def _task(name: str, made: ReadyMade) -> Entry:
    unset = [variable for variable in made.variables if not os.environ.get(variable)]
    return {"name": f"zoo:{name}", "summary": summary(made.function), "unset": unset} | _needs(made)


def _entry(name: str, kind: type[BaseModel]) -> Entry:
    return {"name": name, "summary": summary(kind), "settings": settings(kind)} | _needs(kind)


def summary(thing: Any) -> str:
    """The first sentence of the docstring of a class or function."""
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".") + "." if paragraph else ""


def _needs(thing: type[BaseModel] | ReadyMade) -> Entry:
    """The packages that the thing needs and this environment lacks, and the command that installs them."""
    packages = getattr(thing, "packages", ())
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    extra = getattr(thing, "extra", "") or getattr(thing, "__module__", "").rpartition(".")[2]
    return {"missing": missing, "install": f"pip install 'featherweight[{extra}]'" if missing else ""}


def settings(kind: type[BaseModel], prefix: str = "") -> list[Entry]:
    """Every setting of a pydantic model: name, type, default, the values allowed, the values that the search tries.

    The settings of a model inside it follow, with dotted names.
    """
    found: list[Entry] = []
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True) if not field.is_required() else None
        if isinstance(default, BaseModel):
            default = default.model_dump(mode="json", exclude_defaults=True)
        entry = {
            "name": prefix + name,
            "type": _type(field.annotation),
            "default": default,
            "required": field.is_required(),
        }
        found.append(entry | {"range": _range(field), "searched": _searched(field)})
        for inner in _models(field.annotation):
            found += settings(inner, f"{prefix}{name}.")
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "one of"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(part) for part in get_args(annotation))
    if annotation is type(None):
        return "none"
    return (
        annotation.__name__
        if isinstance(annotation, type) and not get_args(annotation)
        else str(annotation).replace("typing.", "")
    )


def _marks(field: FieldInfo) -> list[Any]:
    """What stands beside the type of a setting, or of one of its alternatives: bounds, search ranges, choices."""
    found = list(field.metadata)
    for part in (field.annotation, *get_args(field.annotation)):
        if get_origin(part) is Annotated:
            found += [
                mark
                for extra in get_args(part)[1:]
                for mark in (extra.metadata if isinstance(extra, FieldInfo) else [extra])
            ]
    return found


def _range(field: FieldInfo) -> str:
    choices = [
        value
        for part in (field.annotation, *get_args(field.annotation))
        if get_origin(part) is Literal
        for value in get_args(part)
    ]
    bounds = [
        f"{word} {getattr(mark, name)}"
        for mark in _marks(field)
        for name, word in BOUNDS
        if getattr(mark, name, None) is not None
    ]
    return ", ".join([*map(str, choices), *bounds])


def _searched(field: FieldInfo) -> str:
    for mark in _marks(field):
        if isinstance(mark, Between):
            return f"{mark.low:g} to {mark.high:g}{', logarithmic' if mark.log else ''}"
        if isinstance(mark, OneOf):
            return ", ".join(map(str, mark.values))
    return ""
