"""Read several axes at once."""

from __future__ import annotations

from collections.abc import Sequence

from featherweight.core.axis import Axis, Bench, axis
from featherweight.core.reading import Reading

DEFAULT = ("accuracy", "size", "latency", "memory")


def read(bench: Bench, axes: Sequence[str | Axis] = DEFAULT) -> list[Reading]:
    """Every reading of every axis, in the order given; an axis is a name (with its defaults) or a value with settings.

    Raises `RecipeError` for a name that is unknown before anything is measured, and what the axes raise.
    """
    chosen = [item if isinstance(item, Axis) else axis(item) for item in axes]
    found: list[Reading] = []
    for item in bench.progress.track(chosen, "measuring", len(chosen)):
        bench.progress.say(f"measuring {item.name}")
        found += item.read(bench)
    return found
