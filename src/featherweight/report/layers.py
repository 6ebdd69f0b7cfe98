"""The layers before and after, and what was left alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..core.record import StepRecord
from ..core.run import Layer
from . import text

MOST = 300  # rows; the largest layers come first in the choice, the rest are summed up in one line
MOST_NAMES = 40  # names of layers that are listed beside one reason


@dataclass(frozen=True)
class Line:
    """One weight in words, with the lengths of its bars in percent of the longest one."""

    place: int
    layer: Layer
    before: str
    after: str
    shape: str
    change: str
    bar_before: float
    bar_after: float


@dataclass(frozen=True)
class Left:
    """Layers that one step left alone for one reason."""

    step: str
    reason: str
    layers: list[str]
    more: int


def lines(layers: list[Layer]) -> list[Line]:
    """The largest layers, in the order of the model."""
    largest = sorted(range(len(layers)), key=lambda place: -layers[place].bytes_before)[:MOST]
    longest = max([1, *(max(layer.bytes_before, layer.bytes_after) for layer in layers)])
    return [_line(place, layers[place], longest) for place in sorted(largest)]


def _line(place: int, layer: Layer, longest: int) -> Line:
    return Line(
        place,
        layer,
        text.size(layer.bytes_before) if layer.shape_before is not None else "–",
        text.size(layer.bytes_after) if layer.shape_after is not None else "removed",
        shapes(layer),
        text.percent(layer.bytes_before, layer.bytes_after),
        100 * layer.bytes_before / longest,
        100 * layer.bytes_after / longest,
    )


def shapes(layer: Layer) -> str:
    """The shape before and after: "64×3×3×3 → 40×3×3×3", once where it did not change."""
    before, after = shape(layer.shape_before), shape(layer.shape_after)
    if layer.shape_before is None:
        return f"new: {after}"
    return before if before == after else f"{before} → {after}" if layer.shape_after is not None else before


def shape(sizes: list[int] | None) -> str:
    """A shape as one word."""
    return "–" if sizes is None else "×".join(map(str, sizes)) or "scalar"


def totals(layers: Iterable[Layer]) -> tuple[str, str, str]:
    """Bytes of all layers before and after, and the change."""
    layers = list(layers)
    before, after = sum(layer.bytes_before for layer in layers), sum(layer.bytes_after for layer in layers)
    return text.size(before), text.size(after), text.percent(before, after)


def left_alone(steps: list[StepRecord]) -> list[Left]:
    """What each step left alone, layers with the same reason together."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in steps:
        for left in record.left:
            found.setdefault((str(record.step.get("kind", "")), left.reason), []).append(left.layer)
    return [
        Left(step, reason, names[:MOST_NAMES], max(0, len(names) - MOST_NAMES))
        for (step, reason), names in found.items()
    ]
