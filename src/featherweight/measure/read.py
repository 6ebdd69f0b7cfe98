"""Read several axes at once."""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.core import registry
from featherweight.core.axis import Axis, Bench, axis
from featherweight.core.reading import Reading

FIRST = ("accuracy", "size", "latency", "memory")  # of all axes, in this order; the others follow by name


def select(axes: Sequence[str | Axis] | None = None) -> list[Axis]:
    """The axes by name (with their defaults) or as they are; None stands for all that there are, here and everywhere.

    Raises `RecipeError` for a name that is unknown.
    """
    if axes is None:
        registry.load("axes")
        axes = [*FIRST, *sorted(set(Axis.kinds) - set(FIRST))]
    return [axis(item) if isinstance(item, str) else item for item in axes]


def read(bench: Bench, axes: Sequence[str | Axis] | None = None) -> list[Reading]:
    """Every reading of every axis, in the order given; see `select` for what may be given.

    Raises `RecipeError` for a name that is unknown before anything is measured, and what the axes raise.
    """
    chosen = select(axes)
    found: list[Reading] = []
    for item in bench.progress.track(chosen, "measuring", len(chosen)):
        bench.progress.say(f"measuring {item.name}")
        found += item.read(bench)
    return found
